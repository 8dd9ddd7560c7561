// The tokens of a steered answer: colour, focus by arrow keys, and what is said about one.

import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Cut, Markdown } from "./markdown";
import type { Token } from "./types";

/** By how many nats steering raised a token over the unsteered model; null if it can't be told. */
export function raised(token: Token): number | null {
  if (token.steered === null) return null;
  return token.base === null ? Infinity : token.steered - token.base;
}

// As BOUNDS of amulet/rendering/pieces.py; a test compares them.
const STEPS = [0.5, 1.5, 3, 5];

/** The class of a token's colour: up1 to up4 by how much it was raised, down1 to down4 lowered. */
export function level(token: Token): string {
  const by = raised(token) ?? 0;
  return `${by < 0 ? "down" : "up"}${STEPS.filter((step) => Math.abs(by) >= step).length}`;
}

const number = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 2 });

function nats(logprob: number | null): string {
  if (logprob === null) return "−∞";
  return number.format(logprob).replace("-", "−").replace("−0.00", "0.00");
}

function chance(logprob: number | null): string {
  const p = logprob === null ? 0 : Math.exp(logprob);
  if (p > 0 && p < 1e-4) return "< 0.01%";
  return p > 0.99 ? "> 99%" : percent.format(p);
}

/** A token's text with its spaces and line breaks to be seen. */
export function visible(text: string): string {
  return text === "" ? "the end of the answer" : `“${text.replace(/\n/g, "↵").replace(/ /g, "␣")}”`;
}

/** Where two answers part: the place of the first character that differs; null if none does yet. */
export function parting(one: string, other: string): number | null {
  const shorter = Math.min(one.length, other.length);
  for (let place = 0; place < shorter; place++) if (one[place] !== other[place]) return place;
  return null;
}

/** The word of an unsteered answer from which the steered one goes another way. */
export function partingWord(text: string, place: number | null): Cut[] {
  if (place === null) return [];
  const start = text.slice(0, place).search(/\S+$/);
  const begin = start < 0 ? place : start;
  const length = text.slice(begin).search(/\S\s/) + 1 || text.length - begin;
  return [
    { start: begin, class: "part", token: null },
    { start: begin + length, class: null, token: null },
  ];
}

function cutsOf(tokens: Token[], place: number | null): Cut[] {
  let last = -1; // of the tokens that begin before the place where the answers part
  if (place !== null) last = tokens.findLastIndex(({ start }) => start <= place);
  return tokens.map((token, at) => ({
    start: token.start,
    class: `token ${level(token)}${token.same ? "" : " other"}${at === last ? " part" : ""}`,
    token: at,
  }));
}

interface Given {
  text: string;
  tokens: Token[];
  /** Where the prompt-only answer goes another way. */
  parts: number | null;
  id: string;
}

/** An answer with coloured tokens. One tab stop; arrow keys go from token to token. */
export function Tokens({ text, tokens, parts, id }: Given) {
  const box = useRef<HTMLDivElement>(null);
  const [shown, show] = useState<{ token: number; at: DOMRect } | null>(null);
  const cuts = useMemo(() => cutsOf(tokens, parts), [tokens, parts]);
  const tipId = `${id}-tip`;
  const tab = useRef(0); // the token that the tab key reaches

  // The spans come from the Markdown; what can be focused is set on them here.
  useLayoutEffect(() => {
    const all = box.current!.querySelectorAll<HTMLElement>("[data-token]");
    let stop: HTMLElement | null = null;
    let last = "";
    for (const span of all) {
      const mine = span.dataset.token!;
      if (mine === last) {
        span.removeAttribute("tabindex"); // a token's further part
        continue;
      }
      last = mine;
      if (stop === null || Number(mine) <= tab.current) stop = span;
      if (span.getAttribute("tabindex") !== "-1") span.tabIndex = -1;
    }
    if (stop) stop.tabIndex = 0;
  }, [text]);

  useEffect(() => {
    if (shown === null) return;
    const hide = () => show(null);
    addEventListener("scroll", hide, { passive: true, capture: true });
    addEventListener("resize", hide);
    return () => {
      removeEventListener("scroll", hide, { capture: true });
      removeEventListener("resize", hide);
    };
  }, [shown]);

  const tokenOf = (target: EventTarget | null): HTMLElement | null =>
    (target as HTMLElement | null)?.closest?.("[data-token]") ?? null;

  const look = (event: Event) => {
    const span = tokenOf(event.target);
    if (span === null) return show(null);
    const token = Number(span.dataset.token);
    if (event.type === "focusin") {
      const before = box.current!.querySelector<HTMLElement>('[data-token][tabindex="0"]');
      if (before) before.tabIndex = -1;
      span.tabIndex = 0;
      span.setAttribute("aria-describedby", tipId);
      tab.current = token;
    }
    show({ token, at: widest(span) });
  };

  const blur = (event: Event) => {
    tokenOf(event.target)?.removeAttribute("aria-describedby");
    show(null);
  };

  const leave = () => {
    const focused = tokenOf(document.activeElement);
    if (focused === null || !box.current!.contains(focused)) show(null);
  };

  const move = (event: KeyboardEvent) => {
    if (event.key === "Escape" && shown !== null) {
      event.stopPropagation();
      return show(null);
    }
    const from = tokenOf(event.target);
    if (from === null) return;
    const all = [...box.current!.querySelectorAll<HTMLElement>("[data-token][tabindex]")];
    const place = all.indexOf(from);
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    all[Math.max(0, Math.min(all.length - 1, to))].focus();
  };

  const token = shown && tokens[shown.token];
  return (
    <div
      ref={box}
      class="text tokens"
      role="group"
      aria-label="Steered answer. Arrow keys go from token to token."
      onMouseOver={look}
      onMouseLeave={leave}
      onFocusIn={look}
      onFocusOut={blur}
      onClick={look}
      onKeyDown={move}
    >
      <Markdown text={text} cuts={cuts} />
      {shown && token && <Tip token={token} at={shown.at} id={tipId} />}
    </div>
  );
}

/** Where a token stands: at a line's end its space is one box, and its word below is another. */
function widest(span: HTMLElement): DOMRect {
  const boxes = [...span.getClientRects()].sort((one, other) => other.width - one.width);
  return boxes[0] ?? span.getBoundingClientRect();
}

function Tip({ token, at, id }: { token: Token; at: DOMRect; id: string }) {
  const tip = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const { style, offsetWidth: width, offsetHeight: height } = tip.current!;
    const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
    const below = at.bottom + 6;
    const top = below + height > innerHeight ? Math.max(8, at.top - height - 6) : below;
    style.left = `${left}px`;
    style.top = `${top}px`;
  }, [at]);
  const by = raised(token);
  const rows: [string, number | null][] = [
    ["With the preference", token.preferred],
    ["Without it", token.base],
    ["After steering", token.steered],
  ];
  return (
    <div ref={tip} class="tip" id={id} role="tooltip">
      <p class="tip-head">
        <strong>{visible(token.text)}</strong> {change(by)}
      </p>
      <table>
        <thead>
          <tr>
            <td />
            <th scope="col">log-prob.</th>
            <th scope="col">chance</th>
          </tr>
        </thead>
        <tbody>
          {rows.map(([name, logprob]) => (
            <tr key={name}>
              <th scope="row">{name}</th>
              <td>{nats(logprob)}</td>
              <td>{chance(logprob)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      <p>
        {token.same ? (
          "The unsteered model would have said the same."
        ) : (
          <>
            The unsteered model would have said <strong>{visible(token.unsteered)}</strong>.
          </>
        )}
      </p>
    </div>
  );
}

function change(by: number | null): string {
  if (by === null) return "";
  if (by === Infinity) return "raised from nothing";
  if (Math.abs(by) < 0.005) return "left as it was";
  const figure = number.format(Math.abs(by));
  return by > 0 ? `raised by ${figure} nats` : `lowered by ${figure} nats`;
}
