// The server's protocol: its health, its model, and an answer as a stream of chunks.

import { createParser } from "eventsource-parser";
import type { Column, Message, Model, Settings } from "./types";

/** What the server said instead of an answer. */
export class ServerError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code: string | null,
  ) {
    super(message);
  }
}

/** The address of a route, wherever the page itself is mounted. */
export function address(route: string): string {
  return new URL(route, document.baseURI).href;
}

let apiKey = sessionStorage.getItem("amulet-key");

export function setApiKey(key: string): void {
  apiKey = key;
  sessionStorage.setItem("amulet-key", key);
}

export function hasApiKey(): boolean {
  return apiKey !== null;
}

export async function ask(route: string, options: RequestInit = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  if (apiKey !== null) headers.set("Authorization", `Bearer ${apiKey}`);
  const response = await fetch(address(route), { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const error = said?.error;
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  throw new ServerError(message, response.status, error?.code ?? null);
}

export async function checkHealth(): Promise<void> {
  await ask("health");
}

export async function fetchModel(): Promise<Model> {
  const list = await (await ask("v1/models")).json();
  const id: string = list.data[0].id;
  const facts = await (await ask(`v1/models/${encodeURI(id)}`)).json();
  return {
    id,
    window: facts.max_model_len,
    steering: facts.steering,
    maxTokens: facts.limits.max_tokens,
    maxWishes: facts.limits.preferences,
    readsImages: facts.reads_images === true,
    maxBytes: facts.limits.body_bytes,
    thumbs: facts.thumbs === true,
  };
}

/** The body of a column's chat request. */
export function chatBody(
  model: string,
  messages: Message[],
  settings: Settings,
  column: Column,
): Record<string, unknown> {
  const body: Record<string, unknown> = {
    model,
    messages: messages.map(wire),
    max_tokens: settings.maxTokens,
  };
  if (settings.temperature > 0) {
    body.temperature = settings.temperature;
    if (settings.seed !== null) body.seed = settings.seed;
  }
  if (column === "plain") return { ...body, preference: "" };
  const { floor, placement, focus, loopGuard } = settings;
  const strength = column === "prompted" ? 0 : settings.strength;
  const preference = preferenceOf(settings.wishes);
  return { ...body, preference, strength, floor, placement, focus, loop_guard: loopGuard };
}

/** A message as the server takes it: its images are parts of its content. */
function wire({ role, content, images = [] }: Message): Record<string, unknown> {
  if (images.length === 0) return { role, content };
  const shown = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return { role, content: [...shown, { type: "text", text: content }] };
}

/** A single wish of weight 1 is a text; everything else is a list with weights. */
export function preferenceOf(wishes: Wish[]): string | Wish[] {
  return wishes.length === 1 && wishes[0].weight === 1
    ? wishes[0].text
    : wishes.map(({ text, weight }) => ({ text, weight }));
}

type Wish = Settings["wishes"][number];

export interface TraceToken {
  token_id: number;
  text: string;
  preferred: number | null;
  base: number | null;
  steered: number | null;
  unsteered_id: number;
  unsteered_text: string;
}

export interface Chunk {
  choices: {
    delta: { content?: string; reasoning_content?: string };
    finish_reason: string | null;
    trace?: TraceToken[];
  }[];
  usage?: { prompt_tokens: number; completion_tokens: number; base_prompt_tokens: number };
  error?: { message: string; code: string | null };
}

/** Yields the chunks of an answer as they arrive; an aborted signal ends the decode as well. */
export async function* streamChat(
  body: Record<string, unknown>,
  signal: AbortSignal,
): AsyncGenerator<Chunk> {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const waiting: string[] = [];
  const parser = createParser({ onEvent: (event) => waiting.push(event.data) });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let complete = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      parser.feed(value);
      for (const data of waiting.splice(0)) {
        if (data === "[DONE]") {
          complete = true;
          continue;
        }
        const chunk: Chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message, 200, chunk.error.code);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
  if (!complete) throw new TypeError("The connection broke off.");
}
