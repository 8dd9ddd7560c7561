// Thumbs: what the reader thinks of an answer. The server keeps them, under a name that this browser
// has drawn, and gives them back as pairs of answers for `amulet tune --thumbs`.

import { signal } from "@preact/signals";
import { memo } from "preact/compat";
import { useEffect, useState } from "preact/hooks";
import { change, history } from "./answers";
import { ServerError, ask, chatBody } from "./api";
import { NAMES } from "./columns";
import { Icon } from "./icons";
import * as store from "./store";
import type { Column, Thumb, Turn } from "./types";

/** How many pairs the server has; null: not known yet. */
const pairs = signal<number | null>(null);
const USER = "amulet-user";

/** A route's address with this browser's name. Whoever guessed the name could read its thumbs. */
function route(path = ""): string {
  let name = localStorage.getItem(USER);
  if (name === null) {
    const drawn = crypto.getRandomValues(new Uint8Array(16));
    name = Array.from(drawn, (byte) => byte.toString(16).padStart(2, "0")).join("");
    localStorage.setItem(USER, name);
  }
  return `v1/thumbs${path}?user=${name}`;
}

async function count(): Promise<void> {
  const text = await (await ask(route("/pairs"))).text();
  pairs.value = text.split("\n").length - 1;
}

let before: Promise<unknown> = Promise.resolve();

/** Do something with the server's thumbs, after what was begun before; tell where it fails. */
function act(task: () => Promise<void>): Promise<boolean> {
  const done = before.then(() => attempt(task));
  before = done;
  return done;
}

async function attempt(task: () => Promise<void>): Promise<boolean> {
  try {
    await task();
    await count();
    return true;
  } catch (error) {
    store.announced.value = error instanceof Error ? error.message : "";
    store.failed(error);
    return false;
  }
}

/** Forget what may be forgotten already. */
async function forget(path = ""): Promise<void> {
  await ask(route(path), { method: "DELETE" }).catch((error: unknown) => {
    if (!(error instanceof ServerError && error.status === 404)) throw error;
  });
}

async function rate(turn: Turn, column: Column, given: Thumb): Promise<void> {
  const thumb = turn.thumbs?.[column] === given ? undefined : given;
  const path = `/${encodeURIComponent(`${turn.id}-${column}`)}`;
  const { id, turns } = store.current.value!;
  const { model, messages, ...settings } = chatBody(
    store.model.value?.id ?? "",
    history(turns, turns.find((one) => one.id === turn.id)!, column),
    turn.settings,
    column,
  );
  const preferences = turn.settings.wishes.map(({ text }) => text);
  const body = { messages, preferences, settings, answer: turn[column]!.text, thumb };
  const show = (shown: Thumb | undefined) =>
    change(id, turn.id, ({ thumbs }) => ({ thumbs: { ...thumbs, [column]: shown } }));
  show(thumb);
  const done = await act(async () => {
    if (thumb === undefined) return forget(path);
    await ask(route(path), {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  });
  if (!done) show(turn.thumbs?.[column]);
}

/** Whether a turn's answers see images: no strength is fitted to such answers. */
function isAboutImages(turn: Turn): boolean {
  const turns = store.current.peek()?.turns ?? [];
  const place = turns.findIndex(({ id }) => id === turn.id);
  return turns.slice(0, place + 1).some(({ images }) => images?.length);
}

export function Thumbs({ turn, column }: { turn: Turn; column: Column }) {
  const answer = turn[column]!;
  const busy = answer.state === "waiting" || answer.state === "streaming";
  if (!store.model.value?.thumbs || turn.steered === null || isAboutImages(turn)) return null;
  return (
    <span class="thumbs">
      {(["up", "down"] as const).map((thumb) => {
        const label = `${thumb === "up" ? "Like" : "Dislike"} the ${NAMES[column].toLowerCase()} answer`;
        return (
          <button
            key={thumb}
            type="button"
            class="quiet"
            aria-pressed={turn.thumbs?.[column] === thumb}
            aria-label={label}
            title={thumb === "up" ? "Like" : "Dislike"}
            disabled={busy || answer.text === ""}
            onClick={() => void rate(turn, column, thumb)}
          >
            <Icon name={thumb} />
          </button>
        );
      })}
    </span>
  );
}

/** How many pairs there are, to be saved as a file or deleted. */
export const ThumbsPanel = memo(() => {
  const [sure, setSure] = useState(false);
  const known = store.model.value?.thumbs === true && store.server.value === "ready";
  useEffect(() => {
    if (known) void act(async () => undefined);
  }, [known]);
  if (!store.model.value?.thumbs) return null;

  const save = () =>
    void act(async () => {
      const text = await (await ask(route("/pairs"))).text();
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
      link.download = "thumbs.jsonl";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    });
  const remove = () =>
    void act(async () => {
      await forget();
      store.forgetThumbs();
      store.announced.value = "Your thumbs are deleted.";
    });
  return (
    <fieldset>
      <legend>Your thumbs</legend>
      <p class="hint">
        Like one answer and dislike another one to the same question: they make a pair. The server
        keeps them; <code>amulet tune --thumbs</code> fits a strength to some 30 pairs.
      </p>
      <p class="pairs" role="status">
        {pairs.value === 1 ? "1 pair" : `${pairs.value ?? "–"} pairs`}
      </p>
      <p class="buttons">
        <button type="button" disabled={!pairs.value} onClick={save}>
          <Icon name="save" /> Export pairs
        </button>
        <button
          type="button"
          class={`quiet worded ${sure ? "sure" : ""}`}
          onBlur={() => setSure(false)}
          onClick={() => (sure ? (setSure(false), remove()) : setSure(true))}
        >
          <Icon name="trash" /> {sure ? "Really delete all?" : "Delete all thumbs"}
        </button>
      </p>
    </fieldset>
  );
});
