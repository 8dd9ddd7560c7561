// The preference panel: wishes as chips, the settings of steering, and sampling.

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
  const { wishes, strength, floor, placement, focus, loopGuard, maxTokens, temperature, seed } =
    settings.value;
  const most = model.value?.maxWishes ?? 4;
  const standard = defaults(model.value);
  const full = wishes.length >= most;
  const set = (changed: Wish[]) => changeSettings({ wishes: changed });
  const reset = () => {
    const { strength, floor, placement, focus, loopGuard } = standard;
    changeSettings({ strength, floor, placement, focus, loopGuard });
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
          standard={standard.strength}
          max={2}
          step={0.05}
          range={[-100, 1000]}
          set={(value) => changeSettings({ strength: value })}
          hint={`0: prompt only. ${standard.strength}, marked: this model's default. Above 2, answers often break down; type a larger number to try.`}
        />
        <Slider
          name="Focus"
          value={focus}
          standard={standard.focus}
          max={2}
          step={0.1}
          range={[0, 10]}
          set={(value) => changeSettings({ focus: value })}
          hint="Holds the answer to what was asked; 0 is off. It acts at strengths above 0."
        />
        <Slider
          name="Loop guard"
          value={loopGuard}
          standard={standard.loopGuard}
          max={16}
          step={1}
          range={[0, 1000]}
          set={(value) => changeSettings({ loopGuard: value })}
          hint="Tokens that the answer may repeat of itself before repetition costs likelihood; 0 is off. It acts at strengths above 0."
        />
        <Slider
          name="Floor"
          value={floor}
          standard={standard.floor}
          max={1}
          step={0.01}
          range={[0, 1]}
          set={(value) => changeSettings({ floor: value })}
          hint="Tokens less likely than this share of the likeliest one are left out; 0 is off."
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
            Reset to the model's defaults
          </button>
        </p>
      </fieldset>

      <details class="more">
        <summary>Sampling</summary>
        <NumberField
          name="Max tokens per answer"
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
          At temperature 0 the likeliest token is always chosen. Without a seed, each answer gets a new one.
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
  /** The model's own, which gets a mark. */
  standard: number;
  /** Where the slider ends. */
  max: number;
  step: number;
  /** What may be typed. */
  range: [least: number, most: number];
  hint: string;
  set: (value: number) => void;
}

function Slider({ name, value, standard, max, step, range, hint, set }: SliderGiven) {
  const id = `slider-${name.toLowerCase().replace(" ", "-")}`;
  return (
    <div class="field">
      <label class="name" for={id}>
        {name}
      </label>
      <input
        type="number"
        aria-label={`${name} as a number`}
        value={value}
        min={range[0]}
        max={range[1]}
        step="any"
        onChange={({ currentTarget: field }) => {
          const given = step === 1 ? Math.round(field.valueAsNumber) : field.valueAsNumber;
          const [least, most] = range;
          const taken = Number.isNaN(given) ? value : Math.max(least, Math.min(most, given));
          field.value = String(taken);
          set(taken);
        }}
      />
      <input
        type="range"
        id={id}
        value={value}
        min={0}
        max={max}
        step={step}
        list={`${id}-marks`}
        aria-describedby={`${id}-hint`}
        onInput={(event) => set(event.currentTarget.valueAsNumber)}
      />
      <datalist id={`${id}-marks`}>
        <option value={standard} />
      </datalist>
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
