// The request behind an answer as code: LangChain, LlamaIndex, Python and curl. Images are named by
// their files.

import { address, chatBody, hasApiKey } from "./api";
import type { Column, Message, Picture, Settings } from "./types";

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
  return `${start(asked)}from amulet_integrations.langchain import ChatAmulet

model = ChatAmulet(
    amulet=${connect()},
${options(asked, "max_new_tokens")})
messages = ${messages(asked.messages)}
print(model.invoke(messages).content)
`;
}

function llamaIndex(asked: Asked): string {
  const said = asked.messages.map(({ role, content, images = [] }) => {
    const shown = images.map(({ name }) => `ImageBlock(path=${path(name)}), `);
    const given = images.length
      ? `blocks=[${shown.join("")}TextBlock(text=${literal(content)})]`
      : `content=${literal(content)}`;
    return `    ChatMessage(role=${literal(role)}, ${given}),\n`;
  });
  const blocks = hasImages(asked) ? ", ImageBlock, TextBlock" : "";
  return `${start(asked)}from amulet_integrations.llama_index import AmuletLLM
from llama_index.core.llms import ChatMessage${blocks}

llm = AmuletLLM(
    amulet=${connect()},
${options(asked, "max_tokens")})
messages = [
${said.join("")}]
print(llm.chat(messages).message.content)
`;
}

function python(asked: Asked): string {
  return `${start(asked)}
amulet = ${connect()}
messages = ${messages(asked.messages)}
reply = amulet.chat(
    messages,
${options(asked, "max_new_tokens")})
print(reply.text)
`;
}

function curl(asked: Asked): string {
  const { model, settings, column } = asked;
  const key = hasApiKey() ? '  -H "Authorization: Bearer $AMULET_API_KEY" \\\n' : "";
  const begin = `curl ${quoted(address("v1/chat/completions"))} \\
  -H "Content-Type: application/json" \\
${key}`;
  // The shell reads the images where a mark stands in the place of their data.
  const mark = `image-${Math.random()}-`;
  const pictures: Picture[] = [];
  const marked = asked.messages.map((said) => ({
    ...said,
    images: said.images?.map((picture) => {
      const head = picture.url.slice(0, picture.url.indexOf(",") + 1);
      return { ...picture, url: `${head}${mark}${pictures.push(picture) - 1}.` };
    }),
  }));
  const body = JSON.stringify(chatBody(model, marked, settings, column), null, 2);
  if (pictures.length === 0) return `${begin}  -d ${quoted(body)}\n`;
  const read = pictures.reduce(
    (text, { name }, place) =>
      text.replace(`${mark}${place}.`, () => `$(base64 < ${quoted(name)} | tr -d '\\n')`),
    body.replace(/[\\$`]/g, "\\$&"),
  );
  return `${FILES}${begin}  -d @- <<JSON\n${read}\nJSON\n`;
}

const FILES = "# The images are read from the current folder.\n";

function hasImages({ messages }: Asked): boolean {
  return messages.some(({ images }) => images?.length);
}

function start(asked: Asked): string {
  const images = hasImages(asked);
  const standard = [hasApiKey() ? "import os\n" : "", images ? "from pathlib import Path\n" : ""];
  const first = standard.join("");
  return `${images ? FILES : ""}${first && `${first}\n`}from amulet import Amulet\n`;
}

function path(name: string): string {
  return `Path(${literal(name)})`;
}

function messages(said: Message[]): string {
  const written = said.map(({ role, content, images = [] }) => {
    const shown = images.map(({ name }) => `{"type": "image", "path": ${path(name)}}`);
    const parts = [...shown, literal({ type: "text", text: content })];
    const given = images.length ? `[${parts.join(", ")}]` : literal(content);
    return `    {"role": ${literal(role)}, "content": ${given}},\n`;
  });
  return `[\n${written.join("")}]`;
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
