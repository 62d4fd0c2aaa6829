// Takes the funding notes out of package-lock.json: with them gone (and `.npmrc`'s setting) the file
// holds no address at all, so `npm ci` works with any registry.

import { readFileSync, writeFileSync } from "node:fs";

const path = new URL("../package-lock.json", import.meta.url);
const lock = JSON.parse(readFileSync(path, "utf8"));
for (const entry of Object.values(lock.packages)) delete entry.funding;
const text = `${JSON.stringify(lock, null, 2)}\n`;
if (/"resolved"|"https?:/.test(text)) throw new Error("package-lock.json holds an address");
writeFileSync(path, text);
