/** Calls over one channel: deadlines, AbortSignals and leaving a stream, and errors. Knows no service. */

import {
  type CallOptions as GrpcOptions,
  type ChannelCredentials,
  Client,
  type ClientOptions,
  connectivityState,
  Metadata,
} from "@grpc/grpc-js";

import { BearError } from "./errors.js";

/** How one call is made. */
export interface CallOptions {
  /** Ends the call with CANCELLED; the server stops its work. */
  signal?: AbortSignal | undefined;
  /** Ends the call with DEADLINE_EXCEEDED. Default: no deadline. */
  timeoutMs?: number | undefined;
  /** Headers of this call, besides the client's. */
  metadata?: Record<string, string> | undefined;
}

interface Method<Request, Response> {
  path: string;
  requestStream: false;
  requestSerialize: (value: Request) => Buffer;
  responseDeserialize: (value: Buffer) => Response;
}

/** A method with one answer, as the generated service definitions describe it. */
export interface UnaryMethod<Request, Response> extends Method<Request, Response> {
  responseStream: false;
}

/** A method with a stream of answers. */
export interface StreamMethod<Request, Response> extends Method<Request, Response> {
  responseStream: true;
}

interface Cancellable {
  cancel(): void;
}

/** One channel and the calls that run over it. */
export class Connection {
  readonly #client: Client;
  readonly #headers: Record<string, string>;
  readonly #running = new Set<Cancellable>();
  #closed = false;

  constructor(
    target: string,
    credentials: ChannelCredentials,
    options: ClientOptions,
    headers: Record<string, string>,
  ) {
    this.#client = new Client(target, credentials, options);
    this.#headers = headers;
  }

  /** The answer of a call. */
  unary<Request, Response>(
    method: UnaryMethod<Request, Response>,
    request: Request,
    options: CallOptions = {},
  ): Promise<Response> {
    return new Promise((resolve, reject) => {
      this.#refuse(options.signal);
      const call = this.#client.makeUnaryRequest(
        method.path,
        method.requestSerialize,
        method.responseDeserialize,
        request,
        this.#metadata(options),
        grpcOptions(options),
        (error, response) => {
          release();
          if (error) reject(failure(error, options.signal));
          else resolve(response as Response);
        },
      );
      const release = this.#hold(call, options.signal);
    });
  }

  /**
   * The messages of a stream as `pick` maps them; those that it maps to undefined are left out. The
   * call begins with the first `next()` and is cancelled as soon as the consumer leaves: grpc-js itself
   * leaves it running, and the server at work, when a loop over it breaks.
   */
  stream<Request, Response, Item>(
    method: StreamMethod<Request, Response>,
    request: Request,
    pick: (message: Response) => Item | undefined,
    options: CallOptions = {},
  ): AsyncIterableIterator<Item> {
    const leaving = new AbortController();
    const items = this.#read(method, request, pick, options, leaving.signal);
    return {
      next: () => items.next(),
      return: () => {
        // A generator alone would run its `finally` only after the answer that is being waited for.
        leaving.abort();
        return items.return(undefined);
      },
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }

  async *#read<Request, Response, Item>(
    method: StreamMethod<Request, Response>,
    request: Request,
    pick: (message: Response) => Item | undefined,
    options: CallOptions,
    leaving: AbortSignal,
  ): AsyncGenerator<Item, undefined> {
    this.#refuse(options.signal);
    const call = this.#client.makeServerStreamRequest(
      method.path,
      method.requestSerialize,
      method.responseDeserialize,
      request,
      this.#metadata(options),
      grpcOptions(options),
    );
    // The status of a cancelled call comes when nobody listens any more, which would end the process.
    call.on("error", () => {});
    const release = this.#hold(call, options.signal);
    leaving.addEventListener("abort", () => call.cancel(), { once: true });
    try {
      for await (const message of call as AsyncIterable<Response>) {
        if (leaving.aborted) return;
        // Messages that had come before the abort are not delivered after it.
        if (options.signal?.aborted) throw cancelled(options.signal);
        const item = pick(message);
        if (item !== undefined) yield item;
      }
    } catch (error) {
      if (leaving.aborted) return;
      throw failure(error, options.signal);
    } finally {
      release();
      call.cancel();
    }
  }

  /**
   * Connects, for at most this long; a server that is not there yet is tried again and again. Not
   * grpc-js's own `waitForReady`: that one goes on, and holds the process, when the channel is closed.
   */
  async waitForReady(timeoutMs: number): Promise<void> {
    const channel = this.#client.getChannel();
    const deadline = Date.now() + timeoutMs;
    for (;;) {
      this.#refuse(undefined);
      const state = channel.getConnectivityState(true);
      if (state === connectivityState.READY) return;
      await new Promise<void>((resolve, reject) => {
        const late = new BearError("UNAVAILABLE", `no connection within ${timeoutMs} ms`);
        channel.watchConnectivityState(state, deadline, (error) => (error ? reject(late) : resolve()));
      });
    }
  }

  /** Cancels what runs and gives the connection back. */
  close(): void {
    this.#closed = true;
    for (const call of this.#running) call.cancel();
    this.#client.close();
  }

  #refuse(signal: AbortSignal | undefined): void {
    if (signal?.aborted) throw cancelled(signal);
    if (this.#closed) throw new BearError("CANCELLED", "the client is closed");
  }

  #metadata({ metadata }: CallOptions): Metadata {
    const headers = new Metadata();
    for (const [key, value] of Object.entries({ ...this.#headers, ...metadata })) headers.set(key, value);
    return headers;
  }

  /** Lets `signal` and `close` cancel the call until the returned function is called. */
  #hold(call: Cancellable, signal: AbortSignal | undefined): () => void {
    const cancel = () => call.cancel();
    this.#running.add(call);
    signal?.addEventListener("abort", cancel, { once: true });
    return () => {
      this.#running.delete(call);
      signal?.removeEventListener("abort", cancel);
    };
  }
}

function grpcOptions({ timeoutMs }: CallOptions): GrpcOptions {
  return timeoutMs !== undefined && Number.isFinite(timeoutMs) ? { deadline: Date.now() + timeoutMs } : {};
}

function cancelled(signal: AbortSignal): BearError {
  return new BearError("CANCELLED", "cancelled by the caller", {}, { cause: signal.reason });
}

/** The error of a call; the status of a call that the caller cancelled tells less than the signal. */
function failure(error: unknown, signal: AbortSignal | undefined): unknown {
  const result = BearError.from(error);
  return signal?.aborted && result instanceof BearError && result.code === "CANCELLED"
    ? cancelled(signal)
    : result;
}
