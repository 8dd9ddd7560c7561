// Where a question is written.

import { memo } from "preact/compat";
import { useEffect, useRef, useState } from "preact/hooks";
import { answering, send, stop } from "./answers";
import { Icon } from "./icons";
import { currentId, server } from "./store";

export const Composer = memo(() => {
  const [text, setText] = useState("");
  const area = useRef<HTMLTextAreaElement>(null);
  const busy = answering.value !== null;
  const ready = server.value === "ready" && !busy;

  useEffect(() => area.current?.focus(), [currentId.value]);
  useEffect(() => {
    const { style } = area.current!;
    style.height = "auto";
    style.height = `${Math.min(area.current!.scrollHeight + 2, 200)}px`;
  }, [text]);

  const submit = (event: Event) => {
    event.preventDefault();
    if (!text.trim() || !ready) return;
    send(text);
    setText("");
  };
  const key = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  return (
    <form class="composer" onSubmit={submit}>
      <textarea
        ref={area}
        rows={1}
        aria-label="Your question"
        placeholder="Ask something …"
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={key}
      />
      {busy ? (
        <button type="button" class="main" onClick={stop}>
          <Icon name="stop" /> Stop
        </button>
      ) : (
        <button type="submit" class="main" disabled={!text.trim() || !ready}>
          <Icon name="send" /> Send
        </button>
      )}
    </form>
  );
});
