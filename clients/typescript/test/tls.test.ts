import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test, type TestContext } from "node:test";

import { Server, ServerCredentials } from "@grpc/grpc-js";
import { BearClient, type Tls } from "@bear-grpc/client";

import { HealthService } from "../src/gen/grpc/health/v1/health.js";
import { bearError } from "./helpers.js";

function hasOpenssl(): boolean {
  try {
    execFileSync("openssl", ["version"], { stdio: "ignore" });
    return true;
  } catch {
    return false;
  }
}

const skip = hasOpenssl() ? false : "needs openssl";

/** A certificate for 127.0.0.1 that is its own authority. */
function certificate(t: TestContext): { pem: Buffer; key: Buffer } {
  const folder = mkdtempSync(join(tmpdir(), "bear-tls-"));
  t.after(() => rmSync(folder, { recursive: true }));
  const [key, pem] = [join(folder, "key"), join(folder, "pem")];
  const kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"];
  const names = ["-subj", "/CN=bear", "-addext", "subjectAltName=IP:127.0.0.1"];
  execFileSync("openssl", ["req", "-x509", ...kind, ...names, "-keyout", key, "-out", pem], { stdio: "ignore" });
  return { pem: readFileSync(pem), key: readFileSync(key) };
}

/** A health service behind TLS; with `clients`, only for those whose certificate is this one. */
async function secured(t: TestContext, own: { pem: Buffer; key: Buffer }, clients?: Buffer): Promise<string> {
  const server = new Server();
  const check = (_: unknown, answer: (error: null, response: object) => void) => answer(null, { status: 1 });
  server.addService(HealthService, { check });
  const pair = [{ cert_chain: own.pem, private_key: own.key }];
  const credentials = ServerCredentials.createSsl(clients ?? null, pair, clients !== undefined);
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", credentials, (error, bound) => (error ? reject(error) : resolve(bound)));
  });
  t.after(() => server.forceShutdown());
  return `127.0.0.1:${port}`;
}

function client(t: TestContext, target: string, tls?: boolean | Tls): BearClient {
  const made = new BearClient(target, tls === undefined ? {} : { tls });
  t.after(() => made.close());
  return made;
}

test("TLS with an authority of one's own, with and without grpcs://", { skip }, async (t) => {
  const own = certificate(t);
  const target = await secured(t, own);
  for (const address of [target, `grpcs://${target}`]) {
    assert.equal(await client(t, address, { ca: own.pem }).health(), "SERVING");
  }
});

test("a certificate that nobody trusts is refused, and so is plaintext", { skip }, async (t) => {
  const target = await secured(t, certificate(t));
  const ways: [string, (boolean | Tls)?][] = [[`grpcs://${target}`], [target, true], [target]];
  ways.push([target, { ca: certificate(t).pem }]);
  for (const [address, tls] of ways) await bearError(client(t, address, tls).health(), "UNAVAILABLE");
});

test("a client certificate opens a server that asks for one", { skip }, async (t) => {
  const [own, mine] = [certificate(t), certificate(t)];
  const target = await secured(t, own, mine.pem);
  const known = client(t, target, { ca: own.pem, certificate: mine.pem, key: mine.key });
  assert.equal(await known.health(), "SERVING");
  await bearError(client(t, target, { ca: own.pem }).health(), "UNAVAILABLE");
});
