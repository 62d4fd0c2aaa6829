import assert from "node:assert/strict";
import type { TestContext } from "node:test";

import { Metadata, Server, ServerCredentials, type ServiceDefinition, status } from "@grpc/grpc-js";
import { BearClient, BearError, type BearClientOptions, type Code, type Reason } from "@bear-grpc/client";

import { Any } from "../src/gen/google/protobuf/any.js";
import { Status } from "../src/gen/google/rpc/status.js";

/** What a handler of a test gets: enough of grpc-js's two kinds of server calls. */
export interface TestCall {
  request: never;
  metadata: Metadata;
  write(message: object): void;
  end(): void;
  emit(event: "error", error: object): void;
  once(event: "cancelled", listener: () => void): void;
}
type Answer = (error: object | null, response?: object) => void;

/** Handlers by method name; a handler of a stream has no second parameter. */
export type Handlers = Record<string, (call: any, answer: Answer) => void>;

/** A client of a grpc-js server with these handlers; both end with the test. */
export async function connect(
  t: TestContext,
  services: [ServiceDefinition, Handlers][],
  options: BearClientOptions = {},
): Promise<{ client: BearClient }> {
  const server = new Server();
  for (const [definition, handlers] of services) server.addService(definition, handlers);
  const port = await new Promise<number>((resolve, reject) => {
    server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, bound) =>
      error ? reject(error) : resolve(bound),
    );
  });
  const client = new BearClient(`127.0.0.1:${port}`, options);
  t.after(() => {
    client.close();
    server.forceShutdown();
  });
  return { client };
}

/** A failed status as a server sends it, with details given as type and encoded message. */
export function failure(code: status, message: string, details: [type: string, value: Uint8Array][]): object {
  const packed = details.map(([type, value]): Any => ({ typeUrl: `type.googleapis.com/${type}`, value }));
  const bytes = Status.encode({ code, message, details: packed }).finish();
  return failureBytes(code, message, Buffer.from(bytes));
}

export function failureBytes(code: status, message: string, bytes: Buffer): object {
  const metadata = new Metadata();
  metadata.set("grpc-status-details-bin", bytes);
  return Object.assign(new Error(message), { code, details: message, metadata });
}

/** The BearError that `work` fails with. */
export async function bearError(work: Promise<unknown>, code: Code, reason?: Reason): Promise<BearError> {
  const error = await work.then(
    () => assert.fail(`the call should have failed with ${code}`),
    (caught: unknown) => caught,
  );
  if (!(error instanceof BearError)) throw error;
  assert.equal(error.code, code, error.message);
  if (reason !== undefined) assert.equal(error.reason, reason, error.message);
  return error;
}

export async function collect<Item>(items: AsyncIterable<Item>): Promise<Item[]> {
  const result: Item[] = [];
  for await (const item of items) result.push(item);
  return result;
}
