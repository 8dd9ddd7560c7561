// The preference panel: wishes as chips, strength, floor, placement and sampling.

import { memo } from "preact/compat";
import { useState } from "preact/hooks";
import { Icon } from "./icons";
import { changeSettings, defaults, model, settings } from "./store";
import type { Placement, Wish } from "./types";

export const PRESETS: [name: string, text: string][] = [
  ["Short", "Answer in one short sentence."],
  ["In depth", "Explain in depth, with reasons and details."],
  ["For a child", "Explain it as to a child of six, with simple words."],
  ["As a list", "Answer as a bullet list."],
  ["Examples", "Give concrete examples."],
  ["Friendly", "Be warm, friendly and encouraging."],
  ["Formal", "Write formally and objectively."],
  ["Poetic", "Answer like a poet, full of images."],
  ["Pirate", "Talk like a pirate."],
];

const PLACES: [value: Placement, name: string][] = [
  ["system", "System message"],
  ["user", "Question"],
  ["both", "Both"],
];

export const SettingsPanel = memo(() => {
  const { wishes, strength, floor, placement, maxTokens, temperature, seed } = settings.value;
  const most = model.value?.maxWishes ?? 4;
  const full = wishes.length >= most;
  const set = (changed: Wish[]) => changeSettings({ wishes: changed });
  const reset = () => {
    const { strength, floor, placement } = defaults(model.value);
    changeSettings({ strength, floor, placement });
  };
  return (
    <div class="settings">
      <fieldset>
        <legend>Preference</legend>
        <div class="chips">
          {PRESETS.map(([name, text]) => {
            const on = wishes.some((wish) => wish.text === text);
            return (
              <button
                key={name}
                type="button"
                class="chip"
                aria-pressed={on}
                title={text}
                disabled={!on && full}
                onClick={() =>
                  set(
                    on
                      ? wishes.filter((wish) => wish.text !== text)
                      : [...wishes, { text, weight: 1 }],
                  )
                }
              >
                {name}
              </button>
            );
          })}
        </div>
        <OwnWish wishes={wishes} full={full} set={set} />
        {full && <p class="hint">This server takes {most} preferences per request.</p>}
        {wishes.length > 0 ? (
          <ul class="wishes-list" aria-label="Preferences in force">
            {wishes.map((wish, place) => (
              <WishRow
                key={wish.text}
                wish={wish}
                set={(weight) =>
                  set(wishes.map((old, at) => (at === place ? { ...old, weight } : old)))
                }
                remove={() => set(wishes.filter((_, at) => at !== place))}
              />
            ))}
          </ul>
        ) : (
          <p class="hint">Without a preference there is one plain answer.</p>
        )}
      </fieldset>

      <fieldset>
        <legend>Steering</legend>
        <Slider
          name="Strength"
          value={strength}
          min={-1}
          max={8}
          step={0.1}
          set={(value) => changeSettings({ strength: value })}
          hint="−1 no preference · 0 the prompt alone · 0.5 to 2 a push · 4.6 the paper"
        />
        <Slider
          name="Floor"
          value={floor}
          min={0}
          max={1}
          step={0.01}
          set={(value) => changeSettings({ floor: value })}
          hint="Tokens below this share of the likeliest one are out; 0 is off"
        />
        <div class="field" role="radiogroup" aria-labelledby="placement">
          <span class="name" id="placement">
            Placement
          </span>
          <div class="segments">
            {PLACES.map(([value, name]) => (
              <label key={value}>
                <input
                  type="radio"
                  name="placement"
                  checked={placement === value}
                  onChange={() => changeSettings({ placement: value })}
                />
                <span>{name}</span>
              </label>
            ))}
          </div>
        </div>
        <p>
          <button type="button" class="quiet worded" onClick={reset}>
            Back to the model's own setting
          </button>
        </p>
      </fieldset>

      <details class="more">
        <summary>Sampling</summary>
        <NumberField
          name="Tokens at most"
          value={maxTokens}
          min={1}
          max={model.value?.maxTokens ?? 4096}
          step={1}
          set={(value) => changeSettings({ maxTokens: Math.round(value ?? 256) })}
        />
        <NumberField
          name="Temperature"
          value={temperature}
          min={0}
          max={5}
          step={0.1}
          set={(value) => changeSettings({ temperature: value ?? 0 })}
        />
        <NumberField
          name="Seed"
          value={seed}
          min={0}
          max={2 ** 31 - 1}
          step={1}
          optional
          set={(value) => changeSettings({ seed: value === null ? null : Math.round(value) })}
        />
        <p class="hint">
          Temperature 0 always takes the likeliest token. No seed: a new one each time.
        </p>
      </details>
    </div>
  );
});

function OwnWish({ wishes, full, set }: { wishes: Wish[]; full: boolean; set: (w: Wish[]) => void }) {
  const [text, setText] = useState("");
  const wish = text.trim();
  const known = wishes.some((other) => other.text === wish);
  const add = (event: Event) => {
    event.preventDefault();
    if (!wish || known || full) return;
    set([...wishes, { text: wish, weight: 1 }]);
    setText("");
  };
  return (
    <form class="own" onSubmit={add}>
      <input
        type="text"
        aria-label="Your own preference"
        placeholder="In your own words …"
        value={text}
        maxLength={2000}
        onInput={(event) => setText(event.currentTarget.value)}
      />
      <button type="submit" disabled={!wish || known || full}>
        Add
      </button>
    </form>
  );
}

interface RowGiven {
  wish: Wish;
  set: (weight: number) => void;
  remove: () => void;
}

function WishRow({ wish, set, remove }: RowGiven) {
  const away = wish.weight < 0;
  return (
    <li class={away ? "away" : ""}>
      <span class="wish-text">
        {away && <strong>Away from: </strong>}
        {wish.text}
      </span>
      <span class="wish-tools">
        <button
          type="button"
          class="sign"
          aria-pressed={away}
          aria-label={`Steer away from: ${wish.text}`}
          title="Steer towards it or away from it"
          onClick={() => set(-wish.weight || -1)}
        >
          {away ? "−" : "+"}
        </button>
        <label>
          <span class="unseen">Weight of: {wish.text}</span>
          <input
            type="number"
            value={Math.abs(wish.weight)}
            min={0}
            max={10}
            step={0.25}
            onChange={(event) => {
              const size = Math.max(0, Math.min(10, event.currentTarget.valueAsNumber || 0));
              set(away ? -size : size);
            }}
          />
        </label>
        <button type="button" class="quiet" aria-label={`Remove: ${wish.text}`} onClick={remove}>
          <Icon name="close" />
        </button>
      </span>
    </li>
  );
}

interface SliderGiven {
  name: string;
  value: number;
  min: number;
  max: number;
  step: number;
  hint: string;
  set: (value: number) => void;
}

function Slider({ name, value, min, max, step, hint, set }: SliderGiven) {
  const id = `slider-${name.toLowerCase()}`;
  return (
    <div class="field">
      <label class="name" for={id}>
        {name}
      </label>
      <output for={id}>{String(value).replace("-", "−")}</output>
      <input
        type="range"
        id={id}
        value={value}
        min={min}
        max={Math.max(max, value)}
        step={step}
        aria-describedby={`${id}-hint`}
        onInput={(event) => set(event.currentTarget.valueAsNumber)}
      />
      <p class="hint" id={`${id}-hint`}>
        {hint}
      </p>
    </div>
  );
}

interface NumberGiven {
  name: string;
  value: number | null;
  min: number;
  max: number;
  step: number;
  optional?: boolean;
  set: (value: number | null) => void;
}

function NumberField({ name, value, min, max, step, optional, set }: NumberGiven) {
  const take = (field: HTMLInputElement) => {
    const given = field.valueAsNumber;
    if (Number.isNaN(given)) set(null);
    else set(Math.max(min, Math.min(max, given)));
  };
  return (
    <label class="number">
      <span>{name}</span>
      <input
        type="number"
        value={value ?? ""}
        min={min}
        max={max}
        step={step}
        placeholder={optional ? "random" : undefined}
        onChange={(event) => take(event.currentTarget)}
      />
    </label>
  );
}
