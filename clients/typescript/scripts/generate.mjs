// Writes src/gen from the protos; with --check, compares instead and fails on
// any difference. Needs the repository's Python environment (`make install`):
// its protoc also writes the server's stubs, so both sides have one compiler.

import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const HERE = fileURLToPath(new URL("..", import.meta.url));
const CONTRACT = join(HERE, "../../protos");
// What lies beside it there is for balancers, not for this client.
const OURS = "bear_grpc/";
const COPIES = join(HERE, "protos");
const TARGET = join(HERE, "src/gen");
const PYTHON = process.env.BEAR_PYTHON ?? join(HERE, "../../.venv/bin/python");
const PLUGIN = join(HERE, "node_modules/.bin/protoc-gen-ts_proto");

const OPTIONS = [
  "outputServices=grpc-js",
  "esModuleInterop=true",
  "importSuffix=.js",
  // Every 64-bit field that the server fills by itself (bytes, counts, seeds up to 2^32 - 1, process
  // ids) stays far below 2^53. Plain numbers add up, compare and go through JSON, bigints do not. A
  // larger value, which only GGUF metadata could hold, fails the call instead of being rounded.
  "forceLong=number",
  "oneof=unions",
  // `optional` scalars are `T | undefined` anyway; this says that messages may be missing too.
  "useOptionals=messages",
  "outputJsonMethods=false",
  "useExactTypes=false",
  // Lets src/index.ts re-export all files: each would otherwise export a DeepPartial of its own.
  "exportCommonSymbols=false",
];

function files(root) {
  return readdirSync(root, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(root, join(entry.parentPath ?? entry.path, entry.name)))
    .sort();
}

function protos(root, below = "") {
  return files(root).filter((name) => name.startsWith(below) && name.endsWith(".proto"));
}

function generate(target) {
  if (!existsSync(PYTHON)) throw new Error(`${PYTHON} is missing: run \`make install\` or set BEAR_PYTHON`);
  const { status } = spawnSync(
    PYTHON,
    [
      ...["-m", "grpc_tools.protoc", `--proto_path=${CONTRACT}`, `--proto_path=${COPIES}`],
      ...[`--plugin=protoc-gen-ts_proto=${PLUGIN}`, `--ts_proto_out=${target}`],
      ...[`--ts_proto_opt=${OPTIONS.join(",")}`, ...protos(CONTRACT, OURS), ...protos(COPIES)],
    ],
    { stdio: ["ignore", "inherit", "inherit"] },
  );
  if (status !== 0) throw new Error("protoc failed");
}

function differences(left, right) {
  const names = new Set([...files(left), ...files(right)]);
  const content = (root, name) =>
    existsSync(join(root, name)) ? readFileSync(join(root, name), "utf8") : undefined;
  return [...names].filter((name) => content(left, name) !== content(right, name));
}

if (process.argv.includes("--check")) {
  const fresh = mkdtempSync(join(tmpdir(), "bear-gen-"));
  try {
    generate(fresh);
    const stale = differences(TARGET, fresh);
    if (stale.length > 0) {
      console.error(`src/gen is not what the protos give, run \`npm run generate\`: ${stale.join(", ")}`);
      process.exitCode = 1;
    }
  } finally {
    rmSync(fresh, { recursive: true });
  }
} else {
  rmSync(TARGET, { recursive: true, force: true });
  mkdirSync(TARGET, { recursive: true });
  generate(TARGET);
}
