// One question and its answers side by side.

import { memo } from "preact/compat";
import { useMemo, useState } from "preact/hooks";
import { answering, keep, regenerate } from "./answers";
import { COLUMNS, NAMES } from "./columns";
import { Icon } from "./icons";
import { Markdown } from "./markdown";
import { Pictures } from "./pictures";
import { announced } from "./store";
import { Thumbs } from "./thumbs";
import { Tokens, parting, partingWord } from "./tokens";
import type { Answer, Column, Turn } from "./types";

interface Given {
  turn: Turn;
  /** What the turn before was continued from; undefined: it had one answer, or there is none. */
  before: Turn["kept"] | undefined;
  last: boolean;
  onCode: (turn: Turn, column: Column) => void;
}

export const TurnView = memo(({ turn, before, last, onCode }: Given) => {
  const busy = answering.value !== null;
  return (
    <article class="turn" aria-label={`Question: ${turn.question}`}>
      <Question turn={turn} busy={busy} />
      <Pictures images={turn.images ?? []} label="Images of the question" />
      {before !== undefined && (
        <p class="hint from">
          {before !== null
            ? `Continued from the ${NAMES[before].toLowerCase()} answer above.`
            : turn.steered
              ? "Each answer continues from the one above it in its own column."
              : "Continued from the plain answer above."}
        </p>
      )}
      <div class={`columns ${turn.steered ? "three" : "one"}`}>
        {COLUMNS.map(
          (column) =>
            turn[column] && (
              <AnswerView
                key={column}
                turn={turn}
                column={column}
                answer={turn[column]}
                last={last}
                onCode={onCode}
              />
            ),
        )}
      </div>
      {last && !busy && (
        <p class="again">
          <button type="button" onClick={() => regenerate(turn)}>
            <Icon name="again" /> Regenerate
          </button>
        </p>
      )}
    </article>
  );
});

function Question({ turn, busy }: { turn: Turn; busy: boolean }) {
  const [draft, setDraft] = useState<string | null>(null);
  if (draft === null) {
    return (
      <div class="question">
        <p>{turn.question}</p>
        <button
          type="button"
          class="quiet"
          aria-label="Edit the question"
          title="Edit the question"
          disabled={busy}
          onClick={() => setDraft(turn.question)}
        >
          <Icon name="edit" />
        </button>
      </div>
    );
  }
  const submit = (event: Event) => {
    event.preventDefault();
    if (!draft.trim() || busy) return;
    setDraft(null);
    regenerate(turn, draft);
  };
  return (
    <form
      class="question editing"
      onSubmit={submit}
      onKeyDown={(event) => event.key === "Escape" && setDraft(null)}
    >
      <textarea
        aria-label="The question"
        rows={3}
        value={draft}
        ref={(area) => {
          if (area && document.activeElement?.closest("form") !== area.form) area.focus();
        }}
        onInput={(event) => setDraft(event.currentTarget.value)}
      />
      <p class="hint">What came after this question goes.</p>
      <button type="submit" class="main" disabled={!draft.trim() || busy}>
        Ask again
      </button>
      <button type="button" onClick={() => setDraft(null)}>
        Cancel
      </button>
    </form>
  );
}

interface AnswerGiven {
  turn: Turn;
  column: Column;
  answer: Answer;
  last: boolean;
  onCode: Given["onCode"];
}

function AnswerView({ turn, column, answer, last, onCode }: AnswerGiven) {
  const steered = column === "steered";
  const name = NAMES[column];
  const { prompted } = turn;
  const kept = turn.kept === column;
  const writing = answer.state === "waiting" || answer.state === "streaming";
  const parts =
    prompted && turn.steered && column !== "plain"
      ? parting(prompted.text, turn.steered.text)
      : null;
  const word = useMemo(() => partingWord(answer.text, parts), [answer.text, parts]);
  const alike = steered && answer.state === "done" && answer.text === prompted?.text;
  return (
    <section
      class={`answer ${column}`}
      aria-label={`${name} answer`}
      aria-busy={writing}
      data-state={answer.state}
    >
      <header>
        <h3>{name}</h3>
        {turn.steered && <p class="wishes">{about(turn, column)}</p>}
      </header>
      {answer.reasoning && (
        <details class="reasoning">
          <summary>Thinking</summary>
          <p>{answer.reasoning}</p>
        </details>
      )}
      {answer.state === "waiting" && <p class="waiting">Waiting for the first token …</p>}
      {steered ? (
        <Tokens text={answer.text} tokens={answer.tokens} parts={parts} id={turn.id} />
      ) : (
        <div class="text">
          <Markdown text={answer.text} cuts={word} />
        </div>
      )}
      {answer.state === "failed" && (
        <p class="error" role="alert">
          {answer.error}
        </p>
      )}
      {!writing && <Ending answer={answer} />}
      {alike && prompted.state === "done" && (
        <p class="ending">The same text as with the preference in the prompt only.</p>
      )}
      <Figures answer={answer} />
      <footer>
        <Thumbs turn={turn} column={column} />
        <span class="space" />
        <Copy text={answer.text} label={`Copy the ${name.toLowerCase()} answer`} />
        <button
          type="button"
          class="quiet worded"
          aria-label={`The ${name.toLowerCase()} answer as code`}
          onClick={() => onCode(turn, column)}
        >
          <Icon name="code" /> As code
        </button>
        {turn.steered && last && (
          <button
            type="button"
            class="quiet worded continue"
            aria-pressed={kept}
            disabled={writing}
            title="The next question continues from this answer in all columns"
            onClick={() => keep(turn, column)}
          >
            {kept && <Icon name="check" />} Continue from this answer
          </button>
        )}
      </footer>
    </section>
  );
}

/** What a column's answer was asked for with. */
function about({ settings }: Turn, column: Column): string {
  if (column === "plain") return "No preference";
  if (column === "prompted") return "Preference in the prompt, no steering (strength 0)";
  const said = settings.wishes.map(({ text, weight }) =>
    weight === 1 ? text : `${weight < 0 ? "Away from: " : ""}${text} × ${Math.abs(weight)}`,
  );
  const { strength, floor, focus, loopGuard } = settings;
  const pushed = `strength ${signed(strength)}, floor ${floor}, focus ${focus}, loop guard ${loopGuard}`;
  return `${said.join(" · ")} (${pushed})`;
}

function signed(value: number): string {
  return String(value).replace("-", "−");
}

function Ending({ answer }: { answer: Answer }) {
  const why =
    answer.state === "stopped"
      ? "Stopped."
      : answer.finish === "length"
        ? "Cut off at the token limit."
        : answer.state === "done" && answer.text === "" && answer.reasoning === ""
          ? "The answer is empty."
          : null;
  return why && <p class="ending">{why}</p>;
}

function Figures({ answer }: { answer: Answer }) {
  const { count, exact, firstMs, lastMs } = answer;
  const seconds = firstMs !== null && lastMs !== null ? (lastMs - firstMs) / 1000 : 0;
  const pace = count > 1 && seconds > 0 ? ((count - 1) / seconds).toFixed(1) : "–";
  return (
    <dl class="figures">
      <div>
        <dt>Tokens</dt>
        <dd>{exact || count === 0 ? count : `≈ ${count}`}</dd>
      </div>
      <div>
        <dt>First token</dt>
        <dd>{firstMs === null ? "–" : `${(firstMs / 1000).toFixed(2)} s`}</dd>
      </div>
      <div>
        <dt>Tokens/s</dt>
        <dd>{pace}</dd>
      </div>
    </dl>
  );
}

export function Copy({ text, label }: { text: string; label: string }) {
  const [done, setDone] = useState(false);
  const act = async () => {
    const copied = await copy(text);
    announced.value = copied ? "Copied." : "This browser does not let the page copy.";
    setDone(copied);
    setTimeout(() => setDone(false), 1500);
  };
  return (
    <button type="button" class="quiet worded" aria-label={label} disabled={!text} onClick={act}>
      <Icon name={done ? "check" : "copy"} /> {done ? "Copied" : "Copy"}
    </button>
  );
}

/** Put a text on the clipboard; over plain HTTP from afar only the older way is there. */
async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    const host = document.querySelector("dialog[open]") ?? document.body;
    host.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}
