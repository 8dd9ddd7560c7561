// What a conversation is made of; this is also what is kept in the browser.

/** One preference and its weight; a negative weight steers away from the text. */
export interface Wish {
  text: string;
  weight: number;
}

export type Placement = "system" | "user" | "both";

/** What a request is sent with, beside its messages. */
export interface Settings {
  wishes: Wish[];
  strength: number;
  floor: number;
  placement: Placement;
  focus: number;
  loopGuard: number;
  maxTokens: number;
  temperature: number;
  seed: number | null;
}

/** A token of a steered answer. Log-probabilities are natural; null stands for minus infinity. */
export interface Token {
  text: string;
  /** Where its text begins in the answer's text. */
  start: number;
  preferred: number | null;
  base: number | null;
  steered: number | null;
  /** What the unsteered model would have said here. */
  unsteered: string;
  same: boolean;
}

export type AnswerState = "waiting" | "streaming" | "done" | "stopped" | "failed";

export interface Answer {
  state: AnswerState;
  text: string;
  reasoning: string;
  tokens: Token[];
  /** Decoded tokens; exact once the server has said so. */
  count: number;
  exact: boolean;
  /** Milliseconds from the request to the first token and to the latest one. */
  firstMs: number | null;
  lastMs: number | null;
  promptTokens: number | null;
  basePromptTokens: number | null;
  finish: string | null;
  error: string | null;
}

/** Without the preference; with it in the prompt alone, which is strength 0; and steered. */
export type Column = "plain" | "prompted" | "steered";

export type Thumb = "up" | "down";

/** An image of a question: its file's name and content, as a data: URL. */
export interface Picture {
  /** By which the browser keeps the content. */
  id: string;
  name: string;
  url: string;
}

export interface Turn {
  id: string;
  question: string;
  /** An older page had none. */
  images?: Picture[];
  settings: Settings;
  plain: Answer;
  /** null: there was no preference. */
  prompted: Answer | null;
  steered: Answer | null;
  /** The answer from which all columns continue; null: each from its own. */
  kept: Column | null;
  thumbs?: Partial<Record<Column, Thumb>>;
}

export interface Conversation {
  id: string;
  title: string;
  updated: number;
  settings: Settings;
  turns: Turn[];
}

export interface Message {
  role: "user" | "assistant";
  content: string;
  images?: Picture[];
}

/** What the server tells of its model. */
export interface Model {
  id: string;
  window: number | null;
  steering: {
    strength: number;
    floor: number;
    placement: Placement;
    focus: number;
    loop_guard: number;
  };
  maxTokens: number;
  maxWishes: number;
  readsImages: boolean;
  /** Of a request's body. */
  maxBytes: number;
  /** Whether the server keeps thumbs. */
  thumbs: boolean;
}
