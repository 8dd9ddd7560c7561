// Asking: a turn's answers, one per column, streamed at once, so that the server decodes them in one
// batch.

import { signal } from "@preact/signals";
import { ServerError, chatBody, streamChat, type Chunk } from "./api";
import * as store from "./store";
import { COLUMNS, NAMES } from "./columns";
import type {
  Answer,
  Column,
  Conversation,
  Message,
  Picture,
  Settings,
  Token,
  Turn,
} from "./types";

/** The turn that is being answered; one at a time. */
export const answering = signal<string | null>(null);
let abort = new AbortController();

/** What a column's answer answers: the earlier turns, each with the answer that it continues from. */
export function history(turns: Turn[], turn: Turn, column: Column): Message[] {
  const earlier = turns.slice(0, turns.indexOf(turn));
  return [
    ...earlier.flatMap((past): Message[] => [
      asking(past),
      { role: "assistant", content: (past[past.kept ?? column] ?? past.plain).text },
    ]),
    asking(turn),
  ];
}

function asking({ question, images }: Turn): Message {
  return { role: "user", content: question, images };
}

export function send(question: string, images: Picture[] = []): void {
  if (answering.value !== null) return;
  let conversation = store.current.value;
  if (conversation === null) {
    conversation = {
      id: store.unique(),
      title: question.trim().replace(/\s+/g, " ").slice(0, 80),
      updated: Date.now(),
      settings: store.fresh.value,
      turns: [],
    };
    store.add(conversation);
    store.fresh.value = store.defaults(store.model.value);
  }
  ask(conversation, conversation.turns, question, images);
}

/** Answer a turn again with the settings of now; later turns are dropped. */
export function regenerate(turn: Turn, question: string = turn.question): void {
  const conversation = store.current.value;
  if (conversation === null || answering.value !== null) return;
  const place = conversation.turns.findIndex(({ id }) => id === turn.id);
  ask(conversation, conversation.turns.slice(0, place), question, turn.images);
}

export function stop(): void {
  abort.abort();
}

/** Have all columns continue from one answer, or each from its own again. */
export function keep(turn: Turn, column: Column): void {
  change(store.currentId.value!, turn.id, ({ kept }) => ({ kept: kept === column ? null : column }));
}

/** Change a part of a turn for good. */
export function change(id: string, turnId: string, by: (turn: Turn) => Partial<Turn>): void {
  changeTurn(id, turnId, (old) => ({ ...old, ...by(old) }));
  store.save(id);
}

function ask(
  conversation: Conversation,
  before: Turn[],
  question: string,
  images?: Picture[],
): void {
  const settings = frozen(conversation.settings);
  const steers = settings.wishes.length > 0;
  const turn: Turn = {
    id: `${conversation.id}-${Date.now()}`,
    question,
    images,
    settings,
    plain: empty(),
    prompted: steers ? empty() : null,
    steered: steers ? empty() : null,
    kept: null,
  };
  const turns = [...before, turn];
  store.change(conversation.id, (old) => ({ ...old, turns, updated: Date.now() }));
  store.save(conversation.id);
  void answer(conversation.id, turn, turns);
}

/** The settings of this turn for good: a draw gets its seed here, so that it can be repeated. */
function frozen(settings: Settings): Settings {
  const wishes = settings.wishes.filter(({ weight }) => weight !== 0);
  const seed =
    settings.temperature > 0 ? (settings.seed ?? Math.floor(Math.random() * 2 ** 31)) : null;
  return { ...settings, wishes, seed };
}

function empty(): Answer {
  return {
    state: "waiting",
    text: "",
    reasoning: "",
    tokens: [],
    count: 0,
    exact: false,
    firstMs: null,
    lastMs: null,
    promptTokens: null,
    basePromptTokens: null,
    finish: null,
    error: null,
  };
}

async function answer(id: string, turn: Turn, turns: Turn[]): Promise<void> {
  abort = new AbortController();
  answering.value = turn.id;
  store.announced.value = "Answering.";
  const columns = COLUMNS.filter((column) => turn[column]);
  const writers = columns.map((column) => new Writer(id, turn.id, column));
  const name = store.model.value?.id ?? "";
  await Promise.all(
    writers.map((writer) => {
      const { column } = writer;
      const body = chatBody(name, history(turns, turn, column), turn.settings, column);
      return writer.read(column === "steered" ? { ...body, trace: true } : body, abort.signal);
    }),
  );
  answering.value = null;
  store.announced.value = writers.map((writer) => writer.summary()).join(" ");
  store.saveNow();
}

/** Reads one answer's stream and shows what has come: once per frame, a long text less often. */
class Writer {
  private now: Answer = empty();
  private frame = 0;
  private timer = 0;
  private began = 0;

  constructor(
    private readonly conversation: string,
    private readonly turn: string,
    readonly column: Column,
  ) {}

  async read(body: Record<string, unknown>, signal: AbortSignal): Promise<void> {
    this.began = performance.now();
    try {
      for await (const chunk of streamChat(body, signal)) this.take(chunk);
      this.now.state = "done";
    } catch (error) {
      if (signal.aborted) this.now.state = "stopped";
      else {
        this.now.state = "failed";
        this.now.error =
          error instanceof ServerError
            ? error.message
            : "The server can't be reached, or the connection broke off.";
        store.failed(error);
      }
    }
    this.show();
    store.save(this.conversation);
  }

  private take(chunk: Chunk): void {
    const { now } = this;
    if (chunk.usage) {
      now.count = chunk.usage.completion_tokens;
      now.exact = true;
      now.promptTokens = chunk.usage.prompt_tokens;
      now.basePromptTokens = chunk.usage.base_prompt_tokens;
    }
    for (const choice of chunk.choices) {
      const said = choice.delta.content ?? "";
      const thought = choice.delta.reasoning_content ?? "";
      if (said && choice.trace) now.tokens = now.tokens.concat(placed(now.text, said, choice.trace));
      now.text += said;
      now.reasoning += thought;
      if (choice.finish_reason) now.finish = choice.finish_reason;
      if (said || thought) {
        now.lastMs = performance.now() - this.began;
        now.firstMs ??= now.lastMs;
        now.count += choice.trace?.length || 1;
        now.state = "streaming";
      }
    }
    // Drawing takes the longer the longer the text is. A hidden page draws no frames at all.
    this.timer ||= window.setTimeout(() => {
      this.frame = requestAnimationFrame(() => this.show());
    }, now.text.length / 100);
  }

  private show(): void {
    clearTimeout(this.timer);
    cancelAnimationFrame(this.frame);
    this.timer = this.frame = 0;
    const shown = { ...this.now };
    changeTurn(this.conversation, this.turn, (turn) => ({ ...turn, [this.column]: shown }));
    store.save(this.conversation);
  }

  summary(): string {
    const name = NAMES[this.column];
    const { state, count } = this.now;
    if (state === "failed") return `${name} answer failed: ${this.now.error}`;
    return `${name} answer ${state === "stopped" ? "stopped" : "complete"}, ${count} tokens.`;
  }
}

/** Give each token its place in the answer: the texts of a piece's tokens join to the piece. */
function placed(text: string, said: string, trace: NonNullable<Chunk["choices"][0]["trace"]>): Token[] {
  const end = text.length + said.length;
  let start = text.length;
  return trace.map((token) => {
    const place = Math.min(start, end);
    start += token.text.length;
    return {
      text: token.text,
      start: place,
      preferred: token.preferred,
      base: token.base,
      steered: token.steered,
      unsteered: token.unsteered_text,
      same: token.token_id === token.unsteered_id,
    };
  });
}

function changeTurn(id: string, turnId: string, by: (turn: Turn) => Turn): void {
  store.change(id, (conversation) => ({
    ...conversation,
    turns: conversation.turns.map((turn) => (turn.id === turnId ? by(turn) : turn)),
  }));
}
