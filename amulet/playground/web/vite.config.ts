// Builds the page into ../static, which is part of the Python package.
import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { resolve } from "node:path";
import { defineConfig, type Plugin } from "vite";

// Says which source the build was made of; a test compares it with the source there is.
function sources(): Plugin {
  return {
    name: "sources",
    generateBundle() {
      const files = [
        ...readdirSync("src").map((name) => `src/${name}`),
        "index.html",
        "package-lock.json",
        "package.json",
        "tsconfig.json",
        "vite.config.ts",
      ].sort();
      const hash = createHash("sha256");
      for (const file of files) hash.update(`${file}\n`).update(readFileSync(file));
      this.emitFile({ type: "asset", fileName: "sources.txt", source: `${hash.digest("hex")}\n` });
    },
  };
}

export default defineConfig({
  base: "./",
  plugins: [sources()],
  resolve: {
    // Its version for browsers decodes by innerHTML, which the content security policy forbids.
    alias: {
      "decode-named-character-reference": resolve(
        "node_modules/decode-named-character-reference/index.js",
      ),
    },
  },
  oxc: { jsx: { runtime: "automatic", importSource: "preact" } },
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2022",
    assetsInlineLimit: 0, // the content security policy lets data: addresses in for images alone
    modulePreload: false, // its polyfill is for browsers that are older than the target
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/health": "http://127.0.0.1:8000" } },
});
