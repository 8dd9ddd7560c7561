// The columns of a turn, in their order, and what they are called.

import type { Column } from "./types";

export const COLUMNS = ["plain", "prompted", "steered"] as const;

export const NAMES: Record<Column, string> = {
  plain: "Plain",
  prompted: "Prompt-only",
  steered: "Steered",
};
