// "As code": the request behind an answer, in four languages.

import { useEffect, useRef, useState } from "preact/hooks";
import { NAMES } from "./columns";
import { LANGUAGES, code, type Asked, type Language } from "./code";
import { Icon } from "./icons";
import { Copy } from "./turn";

export function CodeDialog({ asked, onClose }: { asked: Asked; onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [language, setLanguage] = useState<Language>("LangChain");
  useEffect(() => dialog.current!.showModal(), []);
  const written = code(language, asked);
  const move = (event: KeyboardEvent) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const place = LANGUAGES.indexOf(language) + step + LANGUAGES.length;
    const next = LANGUAGES[place % LANGUAGES.length];
    setLanguage(next);
    document.getElementById(`tab-${next}`)!.focus();
  };
  return (
    <dialog
      ref={dialog}
      class="code"
      aria-labelledby="code-title"
      onClose={onClose}
      onClick={(event) => event.target === dialog.current && dialog.current?.close()}
    >
      <div class="inside">
        <header>
          <h2 id="code-title">The {NAMES[asked.column].toLowerCase()} answer as code</h2>
          <button
            type="button"
            class="quiet"
            aria-label="Close"
            onClick={() => dialog.current!.close()}
          >
            <Icon name="close" />
          </button>
        </header>
        <div class="tabs" role="tablist" aria-label="Language" onKeyDown={move}>
          {LANGUAGES.map((name) => (
            <button
              key={name}
              type="button"
              role="tab"
              id={`tab-${name}`}
              aria-selected={name === language}
              aria-controls="code-panel"
              tabIndex={name === language ? 0 : -1}
              onClick={() => setLanguage(name)}
            >
              {name}
            </button>
          ))}
        </div>
        <div id="code-panel" role="tabpanel" aria-labelledby={`tab-${language}`}>
          <pre tabIndex={0}>
            <code>{written}</code>
          </pre>
        </div>
        <footer>
          <p class="hint">It asks this server, and gets the same answer unless that was stopped.</p>
          <Copy text={written} label="Copy the code" />
        </footer>
      </div>
    </dialog>
  );
}
