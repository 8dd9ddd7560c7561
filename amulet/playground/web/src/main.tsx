// Starts the page.

import { render } from "preact";
import { App, theme } from "./app";
import * as store from "./store";
import "./style.css";

document.documentElement.dataset.theme = theme();
addEventListener("pagehide", store.saveNow);
await store.restore();
render(<App />, document.getElementById("app")!);
void store.watch();
