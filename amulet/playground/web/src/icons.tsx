// Small pictures; the text beside them, or the button's label, says the same.

const PATHS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  copy: "M9 9h10v11H9zM5 15V4h10",
  code: "M8 7l-5 5 5 5M16 7l5 5-5 5",
  edit: "M4 20l1-5L16 4l4 4L9 19z",
  again: "M20 5v5h-5M4 19v-5h5M19 10a7.5 7.5 0 0 0-13.5-2M5 14a7.5 7.5 0 0 0 13.5 2",
  stop: "M7 7h10v10H7z",
  send: "M12 19V5M6 11l6-6 6 6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  close: "M6 6l12 12M18 6L6 18",
  check: "M5 13l4 4L19 7",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M9 9.5v.01",
  up: "M7 11v9H4v-9zM7 11l4-7c1.6 0 2.4 1 2 2.6L12.4 10H18c1.4 0 2.3 1.2 2 2.5l-1.3 6c-.2.9-1 1.5-2 1.5H7",
  down: "M17 13V4h3v9zM17 13l-4 7c-1.6 0-2.4-1-2-2.6l.6-3.4H6c-1.4 0-2.3-1.2-2-2.5l1.3-6c.2-.9 1-1.5 2-1.5H17",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.5 1.5M17.5 17.5L19 19M19 5l-1.5 1.5M6.5 17.5L5 19",
};

export function Icon({ name }: { name: keyof typeof PATHS }) {
  return (
    <svg class="icon" viewBox="0 0 24 24" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}
