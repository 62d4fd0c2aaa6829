/** What a failed call throws, read from its gRPC status and the status's details. */

import { Metadata, status } from "@grpc/grpc-js";

import { ErrorReason } from "./gen/bear_grpc/v1/errors.js";
import type { Any } from "./gen/google/protobuf/any.js";
import { BadRequest, ErrorInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

const DOMAIN = "bear_grpc";
const PREFIX = "ERROR_REASON_";
const DETAILS_TRAILER = "grpc-status-details-bin";

/** Name of a gRPC status, such as `NOT_FOUND`. */
export type Code = keyof typeof status;

type ReasonOf<Name> = Name extends `ERROR_REASON_${infer Rest}` ? Exclude<Rest, "UNSPECIFIED"> : never;

/** A reason of `errors.proto`, without its prefix. */
export type KnownReason = ReasonOf<keyof typeof ErrorReason>;

/** A reason as the server sent it; servers may send reasons that this client does not know. */
export type Reason = KnownReason | (string & {});

/** All known reasons by name: a misspelt `Reason.MODEL_NOT_FOUND` does not compile, a misspelt string does. */
export const Reason = Object.fromEntries(
  Object.keys(ErrorReason)
    .filter((name) => name.startsWith(PREFIX) && name !== `${PREFIX}UNSPECIFIED`)
    .map((name) => [name.slice(PREFIX.length), name.slice(PREFIX.length)]),
) as { readonly [Name in KnownReason]: Name };

/** A field of the request that is wrong. */
export interface Violation {
  /** Path of the field with the contract's names, such as `sampling.top_p`. */
  field: string;
  /** What is wrong with it. */
  description: string;
}

interface Parts {
  reason?: Reason | undefined;
  metadata?: Record<string, string>;
  violations?: Violation[];
  retryAfterSeconds?: number | undefined;
  details?: Any[];
}

/** A call that failed. Branch on `reason` and `code`, never on the message. */
export class BearError extends Error {
  override readonly name = "BearError";
  /** Why, if the server said so; unset for what gRPC finds by itself (cancelled, deadline, no connection). */
  readonly reason: Reason | undefined;
  /** Values that belong to the reason, with the contract's names. */
  readonly metadata: Readonly<Record<string, string>>;
  /** All wrong fields of the request, if that is the reason. */
  readonly violations: readonly Violation[];
  /** When another try makes sense; unset when the server did not say. */
  readonly retryAfterSeconds: number | undefined;
  /** All details as they came, for those that have no property here. */
  readonly details: readonly Any[];

  constructor(
    readonly code: Code,
    message: string,
    parts: Parts = {},
    options?: ErrorOptions,
  ) {
    super(message, options);
    this.reason = parts.reason;
    this.metadata = parts.metadata ?? {};
    this.violations = parts.violations ?? [];
    this.retryAfterSeconds = parts.retryAfterSeconds;
    this.details = parts.details ?? [];
  }

  /** The error for a failure reported by grpc-js; anything else comes back as it is. */
  static from(error: unknown): unknown {
    if (!isStatus(error)) return error;
    const code = (status[error.code] ?? "UNKNOWN") as Code;
    return new BearError(code, error.details, readParts(error.metadata), { cause: error });
  }
}

interface StatusError extends Error {
  code: number;
  details: string;
  metadata: Metadata;
}

function isStatus(error: unknown): error is StatusError {
  return error instanceof Error && "code" in error && typeof error.code === "number" && "metadata" in error;
}

function readParts(trailers: Metadata): Parts {
  const [bytes] = trailers.get(DETAILS_TRAILER);
  if (!(bytes instanceof Uint8Array)) return {};
  const parts: Parts = {};
  try {
    parts.details = Status.decode(bytes).details;
    for (const detail of parts.details) readDetail(detail, parts);
  } catch {
    // Bytes that do not decode must not hide the status, which says enough to act on.
  }
  return parts;
}

function readDetail(detail: Any, parts: Parts): void {
  switch (detail.typeUrl.slice(detail.typeUrl.lastIndexOf("/") + 1)) {
    case "google.rpc.ErrorInfo": {
      const info = ErrorInfo.decode(detail.value);
      // A proxy on the way may add an ErrorInfo of its own domain.
      if (info.domain !== DOMAIN) break;
      parts.reason = info.reason;
      parts.metadata = info.metadata;
      break;
    }
    case "google.rpc.BadRequest": {
      const { fieldViolations } = BadRequest.decode(detail.value);
      parts.violations = fieldViolations.map(({ field, description }) => ({ field, description }));
      break;
    }
    case "google.rpc.RetryInfo": {
      const { retryDelay } = RetryInfo.decode(detail.value);
      if (retryDelay) parts.retryAfterSeconds = retryDelay.seconds + retryDelay.nanos / 1e9;
      break;
    }
  }
}
