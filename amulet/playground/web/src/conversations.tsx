// The list of conversations, each with its preference.

import { memo } from "preact/compat";
import { useState } from "preact/hooks";
import { answering } from "./answers";
import { Icon } from "./icons";
import { conversations, currentId, remove, select } from "./store";
import type { Conversation } from "./types";

export const Conversations = memo(({ onChosen }: { onChosen: () => void }) => {
  return (
    <>
      <button type="button" class="new" onClick={() => choose(null, onChosen)}>
        <Icon name="plus" /> New conversation
      </button>
      {conversations.value.length === 0 ? (
        <p class="hint">Conversations are kept in this browser alone.</p>
      ) : (
        <ul class="conversations">
          {conversations.value.map((conversation) => (
            <Row key={conversation.id} conversation={conversation} onChosen={onChosen} />
          ))}
        </ul>
      )}
    </>
  );
});

function choose(id: string | null, onChosen: () => void): void {
  select(id);
  onChosen();
}

interface RowGiven {
  conversation: Conversation;
  onChosen: () => void;
}

const Row = memo(({ conversation, onChosen }: RowGiven) => {
  const [sure, setSure] = useState(false);
  const { id, title, settings, turns } = conversation;
  const busy = turns.some((turn) => turn.id === answering.value);
  const wishes = settings.wishes.map(({ text, weight }) => (weight < 0 ? `not: ${text}` : text));
  return (
    <li>
      <button
        type="button"
        class="open"
        aria-current={currentId.value === id ? "true" : undefined}
        onClick={() => choose(id, onChosen)}
      >
        <span class="title">{title}</span>
        <span class="preference">{wishes.join(" · ") || "no preference"}</span>
      </button>
      <button
        type="button"
        class={`quiet ${sure ? "sure" : ""}`}
        aria-label={`${sure ? "Really delete" : "Delete"}: ${title}`}
        title={sure ? "Really delete?" : "Delete"}
        disabled={busy}
        onBlur={() => setSure(false)}
        onClick={() => (sure ? remove(id) : setSure(true))}
      >
        {sure ? "Delete?" : <Icon name="trash" />}
      </button>
    </li>
  );
});
