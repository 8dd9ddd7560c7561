// Images of a question: taken from files, the clipboard or what is dropped, and shown small.

import { signal } from "@preact/signals";
import { Icon } from "./icons";
import * as store from "./store";
import type { Picture } from "./types";

/** The images of the question that is being written. */
export const attached = signal<Picture[]>([]);
/** Why a file was not attached. */
export const refused = signal("");
/** How many times files are being attached. */
export const attaching = signal(0);
let before: Promise<unknown> = Promise.resolve();

export const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const FORMATS = "PNG, JPEG, WebP, GIF or BMP";
const REST = 2 ** 16; // bytes of a request's body that are left to its texts

/** What may be attached. */
export function allowed(): string {
  return `${FORMATS}, ${megabytes((3 / 4) * room())} in a conversation`;
}

/** Attach files to the question, after those from before; what can't be sent is refused. */
export async function attach(files: File[]): Promise<void> {
  if (files.length === 0) return;
  refused.value = "";
  attaching.value++;
  before = before.then(() => attachAll(files));
  await before;
  attaching.value--;
}

async function attachAll(files: File[]): Promise<void> {
  for (const file of files) {
    const name = unused(file.name, [...earlier(), ...attached.value]);
    // base64 has four characters for three bytes
    if (!KINDS.includes(file.type)) refused.value = `${name} is not an image in ${FORMATS}.`;
    else if (taken() + (4 / 3) * file.size > room())
      refused.value =
        `${name} has ${megabytes(file.size)}: a conversation's images may have ` +
        `${megabytes((3 / 4) * room())} together. Make it smaller, or save it as JPEG.`;
    else {
      try {
        const url = await read(file);
        attached.value = [...attached.value, { id: store.unique(), name, url }];
        store.announced.value = `${name} is attached.`;
      } catch {
        refused.value = `${name} can't be read.`;
      }
    }
  }
}

/** The attached images for the conversation of now, which may be another than they were meant for. */
export function take(): Picture[] {
  const taken: Picture[] = [];
  for (const picture of attached.value)
    taken.push({ ...picture, name: unused(picture.name, [...earlier(), ...taken]) });
  attached.value = [];
  refused.value = "";
  return taken;
}

export function detach(picture: Picture): void {
  attached.value = attached.value.filter((other) => other !== picture);
  refused.value = "";
  store.announced.value = `${picture.name} is removed.`;
}

function earlier(): Picture[] {
  return (store.current.value?.turns ?? []).flatMap(({ images }) => images ?? []);
}

/** How many characters all data: URLs of a conversation may have. */
function room(): number {
  return (store.model.value?.maxBytes ?? 0) - REST;
}

function taken(): number {
  return [...earlier(), ...attached.value].reduce((sum, { url }) => sum + url.length, 0);
}

function megabytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MB`;
}

/** A name that no other image of the conversation has: code names images by their files. */
function unused(name: string, others: Picture[]): string {
  const names = others.map((other) => other.name);
  const dot = name.lastIndexOf(".");
  const [stem, ending] = dot > 0 ? [name.slice(0, dot), name.slice(dot)] : [name, ""];
  let found = name;
  for (let number = 2; names.includes(found); number++) found = `${stem}-${number}${ending}`;
  return found;
}

function read(file: File): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

interface Given {
  images: Picture[];
  label: string;
  /** Called after an image was removed; without it, images can't be. */
  onRemoved?: () => void;
}

export function Pictures({ images, label, onRemoved }: Given) {
  if (images.length === 0) return null;
  return (
    <ul class="pictures" aria-label={label}>
      {images.map((picture) => (
        <li key={picture.id}>
          <img src={picture.url} alt={picture.name} title={picture.name} />
          {onRemoved && (
            <button
              type="button"
              class="quiet"
              aria-label={`Remove ${picture.name}`}
              title="Remove"
              onClick={() => {
                detach(picture);
                onRemoved();
              }}
            >
              <Icon name="close" />
            </button>
          )}
        </li>
      ))}
    </ul>
  );
}
