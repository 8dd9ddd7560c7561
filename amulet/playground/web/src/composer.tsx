// Where a question is written, and images are attached to it.

import { memo } from "preact/compat";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { answering, send, stop } from "./answers";
import { Icon } from "./icons";
import { KINDS, Pictures, allowed, attach, attached, attaching, refused, take } from "./pictures";
import { currentId, model, server } from "./store";

export const Composer = memo(() => {
  const [text, setText] = useState("");
  const area = useRef<HTMLTextAreaElement>(null);
  const busy = answering.value !== null;
  const ready = server.value === "ready" && !busy && attaching.value === 0;
  const readsImages = model.value?.readsImages ?? false;
  const images = readsImages ? attached.value : [];

  useEffect(() => area.current?.focus(), [currentId.value]);
  useEffect(() => {
    const { style } = area.current!;
    style.height = "auto";
    style.height = `${Math.min(area.current!.scrollHeight + 2, 200)}px`;
  }, [text]);
  // Files may be dropped anywhere on the page.
  useLayoutEffect(() => {
    if (!readsImages) return;
    const over = (event: DragEvent) => {
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    };
    const drop = (event: DragEvent) => {
      over(event);
      void attach([...(event.dataTransfer?.files ?? [])]);
    };
    addEventListener("dragover", over);
    addEventListener("drop", drop);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("drop", drop);
    };
  }, [readsImages]);

  const submit = (event: Event) => {
    event.preventDefault();
    // An image that is just being read is not drawn yet.
    if (!text.trim() || !ready || attaching.value > 0) return;
    send(text, readsImages ? take() : []);
    setText("");
  };
  const key = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  const paste = (event: ClipboardEvent) => {
    const { files, types } = event.clipboardData!;
    // Office programs put a picture of a copied text beside it.
    if (!readsImages || files.length === 0 || types.includes("text/plain")) return;
    event.preventDefault();
    void attach([...files]);
  };
  return (
    <form class="composer" onSubmit={submit}>
      {readsImages && <Attached images={images} onRemoved={() => area.current?.focus()} />}
      <textarea
        ref={area}
        rows={1}
        aria-label="Your question"
        placeholder="Ask something …"
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={key}
        onPaste={paste}
      />
      {readsImages && <AttachButton />}
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

function Attached({ images, onRemoved }: { images: typeof attached.value; onRemoved: () => void }) {
  return (
    <div class="attached">
      <Pictures images={images} label="Attached images" onRemoved={onRemoved} />
      {refused.value && (
        <p class="error" role="alert">
          {refused.value}
        </p>
      )}
    </div>
  );
}

function AttachButton() {
  const input = useRef<HTMLInputElement>(null);
  return (
    <>
      <input
        ref={input}
        type="file"
        hidden
        multiple
        accept={KINDS.join(",")}
        onChange={({ currentTarget: field }) => {
          void attach([...(field.files ?? [])]);
          field.value = ""; // the same file may be chosen again
        }}
      />
      <button
        type="button"
        aria-label="Attach images"
        title={allowed()}
        onClick={() => input.current!.click()}
      >
        <Icon name="image" />
      </button>
    </>
  );
}
