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
/** Pixels of a side from which an image is scaled down to it: most models see less of it anyway. */
const LONGEST = 1568;
const QUALITY = 0.9; // of what is written as JPEG or WebP

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
    if (!KINDS.includes(file.type)) {
      refused.value = `${name} is not an image in ${FORMATS}.`;
      continue;
    }
    try {
      const image = await scaled(file);
      // base64 has four characters for three bytes
      if (taken() + (4 / 3) * image.size > room())
        refused.value =
          `${name} has ${megabytes(image.size)}: a conversation's images may have ` +
          `${megabytes((3 / 4) * room())} together. Make it smaller, or save it as JPEG.`;
      else {
        const url = await read(image);
        attached.value = [...attached.value, { id: store.unique(), name, url }];
        store.announced.value = `${name} is attached.`;
      }
    } catch {
      refused.value = `${name} can't be read.`;
    }
  }
}

/** The file itself; or, where its image is large, a smaller one, upright and still transparent. */
async function scaled(file: File): Promise<Blob> {
  // What the browser can't decode is for the server to judge.
  const image = await createImageBitmap(file).catch(() => null);
  if (image === null) return file;
  const scale = LONGEST / Math.max(image.width, image.height);
  try {
    if (scale >= 1) return file;
    const [width, height] = [image.width, image.height].map((side) =>
      Math.max(Math.round(side * scale), 1),
    );
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d")!;
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    // Other kinds become PNG, which is exact and keeps what is transparent.
    const type = ["image/jpeg", "image/webp"].includes(file.type) ? file.type : "image/png";
    return await canvas.convertToBlob({ type, quality: QUALITY });
  } finally {
    image.close();
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

function read(file: Blob): Promise<string> {
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
