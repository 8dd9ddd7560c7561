// Markdown as elements. An answer is untrusted: its HTML is shown as text, what is left passes a
// sanitiser, and no markup is ever parsed by the browser.
//
// The parser tells for every piece of text where it stands in the source; so each token of the
// answer keeps its place, whatever marks around it disappear.

import type { Element, ElementContent, Nodes, Root, Text } from "hast";
import { defaultSchema, sanitize, type Schema } from "hast-util-sanitize";
import { toJsxRuntime } from "hast-util-to-jsx-runtime";
import type { Html, Image } from "mdast";
import { fromMarkdown } from "mdast-util-from-markdown";
import { gfmStrikethroughFromMarkdown } from "mdast-util-gfm-strikethrough";
import { gfmTableFromMarkdown } from "mdast-util-gfm-table";
import { toHast, type State } from "mdast-util-to-hast";
import { gfmStrikethrough } from "micromark-extension-gfm-strikethrough";
import { gfmTable } from "micromark-extension-gfm-table";
import { type ComponentChildren, Fragment, type JSX } from "preact";
import { jsx, jsxs } from "preact/jsx-runtime";
import { memo } from "preact/compat";

const PARSING = {
  extensions: [gfmTable(), gfmStrikethrough()],
  mdastExtensions: [gfmTableFromMarkdown(), gfmStrikethroughFromMarkdown()],
};

const HANDLERS = {
  html: (_: State, node: Html): Text => ({
    type: "text",
    value: node.value,
    position: node.position,
  }),
  // An image would be fetched from wherever the answer says.
  image: (_: State, node: Image): Text => ({ type: "text", value: node.alt || node.url }),
  imageReference: (_: State, node: { alt?: string | null }): Text => ({
    type: "text",
    value: node.alt ?? "",
  }),
};

const SCHEMA: Schema = {
  ...defaultSchema,
  tagNames: (
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul"
  ).split(" "),
  attributes: { a: ["href"], ol: ["start"], td: ["align"], th: ["align"] },
  protocols: { href: ["http", "https", "mailto"] },
  required: {},
};

const COMPONENTS = {
  a: (given: JSX.IntrinsicElements["a"]) => (
    <a {...given} target="_blank" rel="noopener noreferrer nofollow" />
  ),
  // What scrolls can be reached by keyboard.
  pre: (given: JSX.IntrinsicElements["pre"]) => <pre {...given} tabIndex={0} />,
  table: (given: { children?: ComponentChildren }) => (
    <div class="wide" tabIndex={0} role="group" aria-label="Table">
      <table>{given.children}</table>
    </div>
  ),
  // The page has headings of its own above these.
  ...Object.fromEntries(
    [1, 2, 3, 4, 5, 6].map((depth) => [
      `h${depth}`,
      (given: { children?: ComponentChildren }) => (
        <p class={`heading h${Math.min(depth, 4)}`} role="heading" aria-level={Math.min(6, depth + 3)}>
          {given.children}
        </p>
      ),
    ]),
  ),
};

/** A place where the answer's text is cut, and what its part up to the next cut gets. */
export interface Cut {
  start: number;
  class: string | null;
  token: number | null;
}

/** An answer as elements; with cuts, its text in spans. */
export const Markdown = memo(({ text, cuts }: { text: string; cuts?: Cut[] }) => {
  const tree = toHast(fromMarkdown(text, PARSING), { handlers: HANDLERS });
  const clean = sanitize(tree, SCHEMA) as Root;
  if (cuts?.length) mark(clean, text, cuts, [0, text.length]);
  return toJsxRuntime(clean, {
    Fragment,
    jsx,
    jsxs,
    components: COMPONENTS,
    elementAttributeNameCase: "html",
  } as unknown as Parameters<typeof toJsxRuntime>[1]) as unknown as JSX.Element;
});

type Range = [start: number, end: number];

/** Replace each text by its spans. */
function mark(parent: Root | Element, source: string, cuts: Cut[], within: Range): void {
  let [from, end] = range(parent, within);
  const children: ElementContent[] = [];
  for (const child of parent.children as ElementContent[]) {
    if (child.type === "text") {
      const [start, stop] = range(child, [from, end]);
      const places = align(child.value, source, start, stop);
      children.push(...spans(child.value, places, cuts));
      if (places.length) from = places[places.length - 1] + 1;
    } else {
      if (child.type === "element") {
        mark(child, source, cuts, [from, end]);
        from = range(child, [from, end])[1];
      }
      children.push(child);
    }
  }
  parent.children = children;
}

function range(node: Nodes, fallback: Range): Range {
  const start = node.position?.start.offset;
  const end = node.position?.end.offset;
  return start === undefined || end === undefined ? fallback : [start, end];
}

/** Tell for each character of a text where it stands in the source. */
export function align(value: string, source: string, start: number, end: number): number[] {
  // Most texts stand in the source as they are; fences and code marks stand before some.
  const whole = source.slice(start, end).indexOf(value);
  if (whole >= 0) return Array.from({ length: value.length }, (_, index) => start + whole + index);
  // Escapes and the line beginnings of a quotation are in the source alone.
  let place = start;
  return Array.from({ length: value.length }, (_, index) => {
    const found = source.indexOf(value[index], place);
    if (found >= 0 && found < end) place = found + 1;
    return Math.max(start, place - 1);
  });
}

function spans(value: string, places: number[], cuts: Cut[]): ElementContent[] {
  const pieces: ElementContent[] = [];
  let begin = 0;
  while (begin < value.length) {
    const number = cutBefore(cuts, places[begin]);
    const next = cuts[number + 1]?.start ?? Infinity;
    let stop = begin + 1;
    while (stop < value.length && places[stop] < next) stop++;
    const piece = value.slice(begin, stop);
    const cut = cuts[number];
    if (!cut?.class || piece.trim() === "") pieces.push({ type: "text", value: piece });
    else pieces.push(span(piece, cut));
    begin = stop;
  }
  return pieces;
}

function span(piece: string, cut: Cut): Element {
  const properties: Element["properties"] = { className: [cut.class ?? ""] };
  if (cut.token !== null) properties.dataToken = String(cut.token);
  return { type: "element", tagName: "span", properties, children: [{ type: "text", value: piece }] };
}

/** The last cut at a place of the source or before it; -1 if there is none. */
function cutBefore(cuts: Cut[], place: number): number {
  let low = 0;
  let high = cuts.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (cuts[middle].start <= place) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
