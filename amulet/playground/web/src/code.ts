// The request behind an answer as code: LangChain, LlamaIndex, Python and curl.

import { address, chatBody, hasApiKey } from "./api";
import type { Column, Message, Settings } from "./types";

export const LANGUAGES = ["LangChain", "LlamaIndex", "Python", "curl"] as const;
export type Language = (typeof LANGUAGES)[number];

export interface Asked {
  model: string;
  messages: Message[];
  settings: Settings;
  column: Column;
}

export function code(language: Language, asked: Asked): string {
  return { LangChain: langChain, LlamaIndex: llamaIndex, Python: python, curl }[language](asked);
}

function langChain(asked: Asked): string {
  return `${start()}from amulet_integrations.langchain import ChatAmulet

model = ChatAmulet(
    amulet=${connect()},
${options(asked, "max_new_tokens")})
messages = ${messages(asked.messages)}
print(model.invoke(messages).content)
`;
}

function llamaIndex(asked: Asked): string {
  const said = asked.messages.map(
    ({ role, content }) => `    ChatMessage(role=${literal(role)}, content=${literal(content)}),\n`,
  );
  return `${start()}from amulet_integrations.llama_index import AmuletLLM
from llama_index.core.llms import ChatMessage

llm = AmuletLLM(
    amulet=${connect()},
${options(asked, "max_tokens")})
messages = [
${said.join("")}]
print(llm.chat(messages).message.content)
`;
}

function python(asked: Asked): string {
  return `${start()}
amulet = ${connect()}
messages = ${messages(asked.messages)}
reply = amulet.chat(
    messages,
${options(asked, "max_new_tokens")})
print(reply.text)
`;
}

function curl({ model, messages, settings, column }: Asked): string {
  const body = JSON.stringify(chatBody(model, messages, settings, column), null, 2);
  const key = hasApiKey() ? '  -H "Authorization: Bearer $AMULET_API_KEY" \\\n' : "";
  return `curl ${quoted(address("v1/chat/completions"))} \\
  -H "Content-Type: application/json" \\
${key}  -d ${quoted(body)}
`;
}

function start(): string {
  return `${hasApiKey() ? "import os\n\n" : ""}from amulet import Amulet\n`;
}

function connect(): string {
  const url = literal(address(".").replace(/\/$/, ""));
  const key = hasApiKey() ? ', api_key=os.environ["AMULET_API_KEY"]' : "";
  return `Amulet.connect(${url}${key})`;
}

/** What is sent beside the messages, as arguments in Python. */
function options({ model, settings, column }: Asked, limit: string): string {
  const { model: _, messages: __, max_tokens, ...sent } = chatBody(model, [], settings, column);
  const all = Object.entries({ ...sent, [limit]: max_tokens });
  return all.map(([name, value]) => `    ${name}=${literal(value)},\n`).join("");
}

function messages(said: Message[]): string {
  return `[\n${said.map((message) => `    ${literal(message)},\n`).join("")}]`;
}

/** A value as Python writes it. JSON's strings are Python's too. */
export function literal(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object" && value !== null) {
    const fields = Object.entries(value).map(([key, inner]) => `${literal(key)}: ${literal(inner)}`);
    return `{${fields.join(", ")}}`;
  }
  return JSON.stringify(value);
}

/** A text for the shell. */
function quoted(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
