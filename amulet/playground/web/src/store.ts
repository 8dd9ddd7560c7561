// The state of the page: conversations, kept in the browser's IndexedDB, and the server's state.

import { computed, signal } from "@preact/signals";
import { delMany, entries, keys, setMany } from "idb-keyval";
import { ServerError, checkHealth, fetchModel } from "./api";
import type { Answer, Conversation, Model, Picture, Settings } from "./types";

export type ServerState = "connecting" | "ready" | "loading" | "down" | "locked";

export const server = signal<ServerState>("connecting");
export const model = signal<Model | null>(null);
export const conversations = signal<Conversation[]>([]);
export const currentId = signal<string | null>(null);
/** Said to screen readers. */
export const announced = signal("");
/** The draft settings of a conversation that has not begun. */
export const fresh = signal<Settings>(defaults(null));

export const current = computed<Conversation | null>(
  () => conversations.value.find(({ id }) => id === currentId.value) ?? null,
);
export const settings = computed<Settings>(() => current.value?.settings ?? fresh.value);

const CURRENT = "amulet-current";
const DELETED = "amulet-deleted";

export function defaults(known: Model | null): Settings {
  return {
    wishes: [],
    strength: known?.steering.strength ?? 0.35,
    floor: known?.steering.floor ?? 0.1,
    placement: known?.steering.placement ?? "user",
    focus: known?.steering.focus ?? 1,
    loopGuard: known?.steering.loop_guard ?? 4,
    maxTokens: Math.min(256, known?.maxTokens ?? 256),
    temperature: 0,
    seed: null,
  };
}

// --- conversations

/** Read what an earlier visit left. Answers that were being written then were cut off. */
export async function restore(): Promise<void> {
  try {
    await Promise.all(deleted().map(forget)); // a reload may have come before the browser did it
    const kept = new Map(await entries<string, Conversation | string>());
    const found = [...kept.values()].filter((value) => typeof value !== "string");
    conversations.value = found
      .map((value) => interrupted(withImages(value, kept)))
      .sort((one, other) => other.updated - one.updated);
  } catch {
    announced.value = "This browser keeps no data: conversations end with the page.";
  }
  const last = localStorage.getItem(CURRENT);
  if (conversations.value.some(({ id }) => id === last)) currentId.value = last;
}

/** A name that nothing else has. */
export function unique(): string {
  return crypto.randomUUID?.() ?? String(Math.random()).slice(2);
}

// Images are kept beside their conversation, each under its own key, so that they are written once
// and not again with every piece of an answer.
const written = new Set<string>();

function imageKey(id: string, picture: Picture): string {
  return `${id}/${picture.id}`;
}

/** Change a conversation's images; those that become null go. */
function changeImages(
  conversation: Conversation,
  by: (picture: Picture) => Picture | null,
): Conversation {
  const turns = conversation.turns.map((turn) => ({
    ...turn,
    images: turn.images?.map(by).filter((picture) => picture !== null),
  }));
  return { ...conversation, turns };
}

function withImages(kept: Conversation, all: Map<string, unknown>): Conversation {
  return changeImages(kept, (picture) => {
    const key = imageKey(kept.id, picture);
    const url = all.get(key) as string | undefined;
    if (url !== undefined) written.add(key);
    return url === undefined ? null : { ...picture, url };
  });
}

/** Write a conversation, and of its images what has changed. */
async function write(conversation: Conversation): Promise<void> {
  const { id, turns } = conversation;
  const images = new Map(
    turns.flatMap((turn) =>
      (turn.images ?? []).map((picture) => [imageKey(id, picture), picture.url]),
    ),
  );
  const added = [...images].filter(([key]) => !written.has(key));
  const gone = [...written].filter((key) => key.startsWith(`${id}/`) && !images.has(key));
  for (const [key] of added) written.add(key);
  for (const key of gone) written.delete(key);
  const bare = changeImages(conversation, (picture) => ({ ...picture, url: "" }));
  await setMany([[id, bare], ...added]);
  if (gone.length > 0) await delMany(gone);
}

function interrupted(conversation: Conversation): Conversation {
  const ended = (answer: Answer): Answer =>
    answer.state === "waiting" || answer.state === "streaming"
      ? { ...answer, state: "stopped" }
      : answer;
  // An older page had no focus and no loop guard: the server answered with its own.
  const whole = (settings: Settings): Settings => ({ ...defaults(null), ...settings });
  const turns = conversation.turns.map((turn) => ({
    ...turn,
    settings: whole(turn.settings),
    plain: ended(turn.plain),
    prompted: turn.prompted ? ended(turn.prompted) : null, // an older page had no such column
    steered: turn.steered && ended(turn.steered),
  }));
  return { ...conversation, settings: whole(conversation.settings), turns };
}

export function select(id: string | null): void {
  currentId.value = id;
  if (id === null) localStorage.removeItem(CURRENT);
  else localStorage.setItem(CURRENT, id);
}

export function add(conversation: Conversation): void {
  conversations.value = [conversation, ...conversations.value];
  select(conversation.id);
  save(conversation.id);
}

export function remove(id: string): void {
  conversations.value = conversations.value.filter((conversation) => conversation.id !== id);
  if (currentId.value === id) select(null);
  localStorage.setItem(DELETED, JSON.stringify([...deleted(), id])); // at once, unlike IndexedDB
  void forget(id).catch(() => undefined);
}

function deleted(): string[] {
  return JSON.parse(localStorage.getItem(DELETED) ?? "[]") as string[];
}

async function forget(id: string): Promise<void> {
  const own = (await keys<string>()).filter((key) => key === id || key.startsWith(`${id}/`));
  await delMany(own);
  localStorage.setItem(DELETED, JSON.stringify(deleted().filter((other) => other !== id)));
}

export function change(id: string, by: (conversation: Conversation) => Conversation): void {
  conversations.value = conversations.value.map((conversation) =>
    conversation.id === id ? by(conversation) : conversation,
  );
}

export function changeSettings(part: Partial<Settings>): void {
  const id = currentId.value;
  if (id === null) fresh.value = { ...fresh.value, ...part };
  else {
    change(id, (conversation) => ({
      ...conversation,
      settings: { ...conversation.settings, ...part },
    }));
    save(id);
  }
}

/** Forget every thumb that was given, also in other conversations. */
export function forgetThumbs(): void {
  for (const { id, turns } of conversations.value) {
    if (!turns.some(({ thumbs }) => thumbs)) continue;
    change(id, (conversation) => ({
      ...conversation,
      turns: conversation.turns.map((turn) => ({ ...turn, thumbs: undefined })),
    }));
    save(id);
  }
}

const unsaved = new Set<string>();
let saving: ReturnType<typeof setTimeout> | undefined;

/** Keep a conversation; soon, so that a stream of changes is written a few times only. */
export function save(id: string): void {
  unsaved.add(id);
  saving ??= setTimeout(saveNow, 400);
}

export function saveNow(): void {
  clearTimeout(saving);
  saving = undefined;
  for (const id of unsaved) {
    const kept = conversations.value.find((conversation) => conversation.id === id);
    if (kept) void write(kept).catch(() => undefined);
  }
  unsaved.clear();
}

// --- the server

const WELL = 15_000;
const UNWELL = 1_500;
let timer: ReturnType<typeof setTimeout> | undefined;

/** Look how the server is, now and from then on. */
export async function watch(): Promise<void> {
  clearTimeout(timer);
  try {
    await checkHealth();
    if (server.value !== "ready" || model.value === null) await meet();
  } catch (error) {
    failed(error);
  }
  timer = setTimeout(watch, server.value === "ready" ? WELL : UNWELL);
}

async function meet(): Promise<void> {
  const known = await fetchModel();
  // Settings that nobody has touched follow the model's own.
  const untouched = JSON.stringify(fresh.value) === JSON.stringify(defaults(model.value));
  model.value = known;
  if (untouched) fresh.value = defaults(known);
  if (server.value === "down") announced.value = "The server is back.";
  server.value = "ready";
}

/** Take note of what a failed request says of the server. */
export function failed(error: unknown): void {
  const before = server.value;
  if (!(error instanceof ServerError)) server.value = "down";
  else if (error.status === 401) server.value = "locked";
  else if (error.code === "loading") server.value = "loading";
  else if (error.status === 503) server.value = "down";
  if (server.value !== before && server.value !== "ready") {
    clearTimeout(timer);
    timer = setTimeout(watch, UNWELL);
  }
}
