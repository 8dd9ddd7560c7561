// The page: conversations to the left, the answers, the preference to the right.

import { useCallback, useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { answering, history, regenerate, send, stop } from "./answers";
import { setApiKey } from "./api";
import type { Asked } from "./code";
import { CodeDialog } from "./code-dialog";
import { Composer } from "./composer";
import { Conversations } from "./conversations";
import { Icon } from "./icons";
import { SettingsPanel } from "./settings";
import * as store from "./store";
import { ThumbsPanel } from "./thumbs";
import { TurnView } from "./turn";
import type { Column, Settings, Turn } from "./types";

const SUGGESTIONS = [
  "What is a black hole?",
  "How do I learn to cook?",
  "Why is the sky blue?",
  "Plan a quiet Sunday for me.",
];

type Drawer = "conversations" | "settings" | null;

export function App() {
  const [drawer, setDrawer] = useState<Drawer>(null);
  const [asked, setAsked] = useState<Asked | null>(null);
  const conversation = store.current.value;
  const turns = conversation?.turns ?? [];

  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      if (event.key !== "Escape" || event.defaultPrevented) return;
      if (drawer !== null) setDrawer(null);
      else if (!document.querySelector("dialog[open]")) stop();
    };
    addEventListener("keydown", key);
    return () => removeEventListener("keydown", key);
  }, [drawer]);

  const onCode = useRef((turn: Turn, column: Column) => {
    const { turns: all } = store.current.value!;
    setAsked({
      model: store.model.value?.id ?? "",
      messages: history(all, all.find(({ id }) => id === turn.id)!, column),
      settings: turn.settings,
      column,
    });
  });
  const close = useCallback(() => setDrawer(null), []);
  const toggle = (which: Drawer) => setDrawer(drawer === which ? null : which);

  return (
    <div class="page">
      <header class="top">
        <button
          type="button"
          class="quiet drawer-left"
          aria-label="Conversations"
          aria-expanded={drawer === "conversations"}
          onClick={() => toggle("conversations")}
        >
          <Icon name="menu" />
        </button>
        <h1>
          Amulet <span>playground</span>
        </h1>
        <p class={`server ${store.server.value}`}>{store.model.value?.id ?? ""}</p>
        <Theme />
        <button
          type="button"
          class="quiet drawer-right"
          aria-label="Preference and steering"
          aria-expanded={drawer === "settings"}
          onClick={() => toggle("settings")}
        >
          <Icon name="sliders" />
        </button>
      </header>

      <nav class={`left ${drawer === "conversations" ? "open" : ""}`} aria-label="Conversations">
        <Conversations onChosen={close} />
      </nav>

      <main>
        <ServerNote />
        {turns.length === 0 ? <Welcome /> : <Turns turns={turns} onCode={onCode.current} />}
        <div class="bottom">
          {conversation && <Changed turns={turns} settings={conversation.settings} />}
          <Composer />
        </div>
      </main>

      <aside
        class={`right ${drawer === "settings" ? "open" : ""}`}
        aria-label="Preference and steering"
      >
        <SettingsPanel />
        <ThumbsPanel />
      </aside>
      {drawer !== null && <div class="shade" onClick={close} />}
      {asked && <CodeDialog asked={asked} onClose={() => setAsked(null)} />}
      <p class="unseen" role="status">
        {store.announced.value}
      </p>
    </div>
  );
}

function Turns({ turns, onCode }: { turns: Turn[]; onCode: (turn: Turn, column: Column) => void }) {
  const box = useRef<HTMLDivElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const following = useRef(true);
  const reached = useRef(0);
  // Follow what is written, unless the reader has scrolled up; also where the box gets smaller.
  useLayoutEffect(() => {
    const outer = box.current!;
    const observer = new ResizeObserver(() => {
      if (following.current) outer.scrollTop = outer.scrollHeight;
    });
    observer.observe(outer);
    observer.observe(content.current!);
    return () => observer.disconnect();
  }, []);
  useLayoutEffect(() => {
    following.current = true;
    box.current!.scrollTop = box.current!.scrollHeight;
  }, [store.currentId.value, turns.length]);
  const scrolled = () => {
    const { scrollTop, clientHeight, scrollHeight } = box.current!;
    // More may have been written since the page itself scrolled: only a way back is the reader's.
    const isAtEnd = scrollTop + clientHeight > scrollHeight - 40;
    following.current = isAtEnd || (following.current && scrollTop >= reached.current);
    reached.current = scrollTop;
  };
  return (
    <div class="turns" ref={box} onScroll={scrolled} tabIndex={0} role="region" aria-label="Answers">
      <div ref={content}>
        <h2 class="unseen">Conversation</h2>
        <Legend />
        {turns.map((turn, place) => (
          <TurnView
            key={turn.id}
            turn={turn}
            before={turns[place - 1]?.steered ? turns[place - 1].kept : undefined}
            last={place === turns.length - 1}
            onCode={onCode}
          />
        ))}
      </div>
    </div>
  );
}

function Legend() {
  return (
    <p class="legend">
      <span class="token down4">lowered most</span>
      <span class="token down2">lowered</span>
      <span class="token">as it was</span>
      <span class="token up2">raised</span>
      <span class="token up4">raised most</span>
      <span class="token other">the unsteered model would say something else</span>
      <span class="token part">prompt-only and steered diverge here</span>
    </p>
  );
}

function Welcome() {
  return (
    <div class="welcome">
      <h2>See a preference steer an answer</h2>
      <p>
        Choose a preference, then ask. Three answers appear: without the preference, with it in the
        prompt only, and steered. Each steered token shows how much steering raised it.
      </p>
      <ul>
        {SUGGESTIONS.map((question) => (
          <li key={question}>
            <button
              type="button"
              disabled={store.server.value !== "ready" || answering.value !== null}
              onClick={() => send(question)}
            >
              {question}
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}

/** Settings that the last answers were not made with. */
function Changed({ turns, settings }: { turns: Turn[]; settings: Settings }) {
  const last = turns.at(-1);
  if (!last || answering.value !== null || same(last.settings, settings)) return null;
  return (
    <p class="changed">
      <span>The settings have changed since the last answer.</span>
      <button
        type="button"
        disabled={store.server.value !== "ready"}
        onClick={() => regenerate(last)}
      >
        <Icon name="again" /> Answer again
      </button>
    </p>
  );
}

function same(used: Settings, now: Settings): boolean {
  const plain = (settings: Settings, seed: number | null) =>
    JSON.stringify([
      settings.wishes.filter(({ weight }) => weight !== 0).map(({ text, weight }) => [text, weight]),
      settings.strength,
      settings.floor,
      settings.placement,
      settings.focus,
      settings.loopGuard,
      settings.maxTokens,
      settings.temperature,
      settings.temperature > 0 ? seed : null,
    ]);
  // Without a seed of its own a draw has got one; that is no change.
  return plain(used, used.seed) === plain(now, now.seed ?? used.seed);
}

function ServerNote() {
  const state = store.server.value;
  const [key, setKey] = useState("");
  if (state === "locked") {
    const submit = (event: Event) => {
      event.preventDefault();
      setApiKey(key);
      void store.watch();
    };
    return (
      <form class="note" onSubmit={submit}>
        <label>
          This server asks for an API key
          <input
            type="password"
            autocomplete="off"
            value={key}
            onInput={(event) => setKey(event.currentTarget.value)}
          />
        </label>
        <button type="submit" disabled={!key}>
          Use it
        </button>
      </form>
    );
  }
  const said = {
    connecting: null,
    ready: null,
    loading: "The model is being loaded. Questions can be asked in a moment.",
    down: "The server can't be reached. The page tries again by itself; nothing is lost.",
  }[state];
  return said && <p class={`note ${state}`} role="alert">{said}</p>;
}

const THEMES = ["auto", "light", "dark"] as const;
const THEME = "amulet-theme";

export function theme(): (typeof THEMES)[number] {
  const kept = localStorage.getItem(THEME);
  return THEMES.find((name) => name === kept) ?? "auto";
}

function Theme() {
  const [now, setNow] = useState(theme);
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  const change = () => {
    localStorage.setItem(THEME, next);
    document.documentElement.dataset.theme = next;
    setNow(next);
  };
  return (
    <button type="button" class="quiet worded theme" aria-label={`Colours: ${now}; change to ${next}`} onClick={change}>
      <Icon name="sun" /> <span>{now}</span>
    </button>
  );
}
