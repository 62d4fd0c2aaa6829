/** The calls of a bear_grpc server as methods. */

import { type ChannelCredentials, type ClientOptions, credentials as grpcCredentials } from "@grpc/grpc-js";

import { type CallOptions, Connection, type StreamMethod, type UnaryMethod } from "./connection.js";
import { BearError } from "./errors.js";
import {
  type CountTokensResponse,
  DetokenizeRequest,
  type DetokenizeResponse,
  type GenerateOnceResponse,
  type GenerateResponse,
  InferenceServiceService as Inference,
  type TokenizeResponse,
} from "./gen/bear_grpc/v1/inference_service.js";
import {
  type DeleteModelResponse,
  GetModelRequest,
  ListModelsRequest,
  LoadModelRequest,
  type MetadataEntry,
  type TensorInfo,
  ModelServiceService as Models,
  RegisterModelRequest,
  type UnloadModelResponse,
} from "./gen/bear_grpc/v1/model_service.js";
import {
  type GetServerInfoResponse,
  ServerServiceService as Server,
} from "./gen/bear_grpc/v1/server_service.js";
import type { LoadOptions, Model, ModelStatus } from "./gen/bear_grpc/v1/types.js";
import {
  type HealthCheckResponse,
  HealthCheckResponse_ServingStatus,
  HealthService,
} from "./gen/grpc/health/v1/health.js";
import {
  type Chat,
  duration,
  type GenerateParams,
  type Partially,
  toCountTokensRequest,
  toGenerateRequest,
  type TokenizeParams,
  toTokenizeRequest,
} from "./messages.js";

/** PEM files as bytes. */
export interface Tls {
  /** Whom to trust. Default: the authorities that Node.js brings. */
  ca?: Buffer;
  /** For servers that ask for a client certificate: it, with those above it, and its private key. */
  certificate?: Buffer;
  key?: Buffer;
}

const SCHEME = "grpcs://";

/** How a client connects. */
export interface BearClientOptions {
  /** TLS: with the authorities that Node.js trusts, or with PEM files of your own. Default: as the target says. */
  tls?: boolean | Tls;
  /** grpc-js's own, in place of `tls`. */
  credentials?: ChannelCredentials;
  /** Options of the grpc-js channel. */
  options?: ClientOptions;
  /** API key of every call, for a server that asks for one. */
  apiKey?: string;
  /** Headers of every call. */
  metadata?: Record<string, string>;
}

/** A message of a generation; those whose event this client does not know are left out. */
export type GenerateEvent = GenerateResponse & { event: NonNullable<GenerateResponse["event"]> };

/** A health status of `grpc.health.v1`. */
export type HealthStatus = "UNKNOWN" | "SERVING" | "NOT_SERVING" | "SERVICE_UNKNOWN";

/**
 * A client of one server. All calls share a connection, which is made with the first call and made
 * anew when it is lost. Every method throws BearError.
 */
export class BearClient {
  readonly #connection: Connection;

  /** `target` is `host:port`, `grpcs://host:port` (TLS) or `unix:/path/to/socket`. */
  constructor(target: string, { tls, credentials, options, apiKey, metadata }: BearClientOptions = {}) {
    // `GetServerInfo` tells how large answers may become; grpc-js would refuse those above 4 MiB.
    const channel = { "grpc.max_receive_message_length": -1, ...options };
    this.#connection = new Connection(
      target.startsWith(SCHEME) ? target.slice(SCHEME.length) : target,
      credentials ?? credentialsOf(tls ?? target.startsWith(SCHEME)),
      channel,
      { ...(apiKey ? { authorization: `Bearer ${apiKey}` } : {}), ...metadata },
    );
  }

  /**
   * Loads a model and waits until it is READY; aborting does not stop the load. `loadSeconds` is 0 when
   * it was loaded already.
   */
  async loadModel(
    name: string,
    options?: Partially<typeof LoadOptions>,
    call?: CallOptions,
  ): Promise<{ status: ModelStatus; loadSeconds: number }> {
    const request = LoadModelRequest.fromPartial(options === undefined ? { name } : { name, options });
    const { status, loadSeconds } = await this.unary(Models.loadModel, request, call);
    return { status: present(status, "status"), loadSeconds };
  }

  /** Ends a model's worker. Running requests get `drainSeconds` to finish; unset: the server's default. */
  unloadModel(
    name: string,
    { drainSeconds, ...call }: CallOptions & { drainSeconds?: number } = {},
  ): Promise<UnloadModelResponse> {
    const drainTimeout = drainSeconds === undefined ? undefined : duration(drainSeconds);
    return this.unary(Models.unloadModel, { name, drainTimeout }, call);
  }

  /** Every model known, ordered by name; pages are fetched as they are needed. */
  async *listModels(
    filter: Omit<Partially<typeof ListModelsRequest>, "pageToken"> = {},
    call?: CallOptions,
  ): AsyncGenerator<Model> {
    const request = ListModelsRequest.fromPartial(filter);
    do {
      const page = await this.unary(Models.listModels, request, call);
      yield* page.models;
      request.pageToken = page.nextPageToken;
    } while (request.pageToken !== "");
  }

  /** One model, also one on the hub only; `metadata` and `tensors` are filled if they are asked for. */
  async getModel(
    name: string,
    { includeMetadata = false, includeTensors = false, ...call }: CallOptions & {
      includeMetadata?: boolean;
      includeTensors?: boolean;
    } = {},
  ): Promise<{ model: Model; metadata: MetadataEntry[]; tensors: TensorInfo[] }> {
    const request = GetModelRequest.fromPartial({ name, includeMetadata, includeTensors });
    const { model, metadata, tensors } = await this.unary(Models.getModel, request, call);
    return { model: present(model, "model"), metadata, tensors };
  }

  /** Where a model stands and what it is doing. */
  async getModelStatus(name: string, call?: CallOptions): Promise<ModelStatus> {
    const { status } = await this.unary(Models.getModelStatus, { name }, call);
    return present(status, "status");
  }

  /** The present status of each model named (none: all), then every change. Ends when the server stops. */
  watchModels(names: string[] = [], call?: CallOptions): AsyncIterableIterator<ModelStatus> {
    return this.stream(Models.watchModels, { names }, ({ status }) => status, call);
  }

  /** Makes a GGUF file on the server known under a name. */
  async registerModel(
    params: Partially<typeof RegisterModelRequest> & { name: string; path: string },
    call?: CallOptions,
  ): Promise<Model> {
    const { model } = await this.unary(Models.registerModel, RegisterModelRequest.fromPartial(params), call);
    return present(model, "model");
  }

  /** Forgets a registered model, or removes the files of a pulled one. */
  deleteModel(name: string, call?: CallOptions): Promise<DeleteModelResponse> {
    return this.unary(Models.deleteModel, { name }, call);
  }

  /**
   * Generates, one event after the other. Leaving the loop, aborting and the deadline stop the work on
   * the server. A loop that ends by itself has seen one `completed` for each index.
   */
  generate(params: GenerateParams, call?: CallOptions): AsyncIterableIterator<GenerateEvent> {
    return this.stream(Inference.generate, toGenerateRequest(params), knownEvent, call);
  }

  /** The text alone, as it comes. Takes one answer only: the texts of several would be mixed. */
  streamText(params: GenerateParams & { n?: 1 }, call?: CallOptions): AsyncIterableIterator<string> {
    const request = toGenerateRequest(params);
    if ((request.n ?? 1) > 1) throw new TypeError("streamText takes n = 1, use generate for several answers");
    const text = ({ event }: GenerateResponse) => (event?.$case === "delta" && event.delta.text) || undefined;
    return this.stream(Inference.generate, request, text, call);
  }

  /** Generates and waits for the whole answer. */
  generateOnce(params: GenerateParams, call?: CallOptions): Promise<GenerateOnceResponse> {
    return this.unary(Inference.generateOnce, { request: toGenerateRequest(params) }, call);
  }

  /** The tokens of a text or a conversation. */
  tokenize(
    model: string,
    input: string | Chat,
    params: TokenizeParams = {},
    call?: CallOptions,
  ): Promise<TokenizeResponse> {
    return this.unary(Inference.tokenize, toTokenizeRequest(model, input, params), call);
  }

  /** The text of tokens. */
  detokenize(
    model: string,
    tokenIds: readonly number[],
    { includeSpecial = false, ...call }: CallOptions & { includeSpecial?: boolean } = {},
  ): Promise<DetokenizeResponse> {
    const request = DetokenizeRequest.fromPartial({ model, tokenIds: [...tokenIds], includeSpecial });
    return this.unary(Inference.detokenize, request, call);
  }

  /** How many tokens an input has, and how many the model takes. */
  countTokens(model: string, input: string | Chat, call?: CallOptions): Promise<CountTokensResponse> {
    return this.unary(Inference.countTokens, toCountTokensRequest(model, input), call);
  }

  /** Version, devices and limits of the server. */
  serverInfo(call?: CallOptions): Promise<GetServerInfoResponse> {
    return this.unary(Server.getServerInfo, {}, call);
  }

  /** Health of the server (`""`), of a service by its full name, or of `models/<name>`. */
  async health(service = "", call?: CallOptions): Promise<HealthStatus> {
    try {
      return healthStatus(await this.unary(HealthService.check, { service }, call));
    } catch (error) {
      // Check says NOT_FOUND for what Watch calls SERVICE_UNKNOWN.
      if (error instanceof BearError && error.code === "NOT_FOUND") return "SERVICE_UNKNOWN";
      throw error;
    }
  }

  /** The same, now and at every change. */
  watchHealth(service = "", call?: CallOptions): AsyncIterableIterator<HealthStatus> {
    return this.stream(HealthService.watch, { service }, healthStatus, call);
  }

  /** Any other method of the contract, for example `unary(ModelServiceService.pruneModels, { dryRun: true })`. */
  unary<Request, Response>(
    method: UnaryMethod<Request, Response>,
    request: Request,
    call?: CallOptions,
  ): Promise<Response> {
    return this.#connection.unary(method, request, call);
  }

  /** Any other stream of the contract; `pick` maps messages and leaves out those that it maps to undefined. */
  stream<Request, Response, Item>(
    method: StreamMethod<Request, Response>,
    request: Request,
    pick: (message: Response) => Item | undefined,
    call?: CallOptions,
  ): AsyncIterableIterator<Item> {
    return this.#connection.stream(method, request, pick, call);
  }

  /** Waits for a connection, also to a server that is only starting. */
  waitForReady(timeoutMs: number): Promise<void> {
    return this.#connection.waitForReady(timeoutMs);
  }

  /** Cancels what runs and closes the connection. */
  close(): void {
    this.#connection.close();
  }
}

function present<Value>(value: Value | undefined, field: string): Value {
  if (value === undefined) throw new BearError("INTERNAL", `the server left out \`${field}\``);
  return value;
}

function knownEvent(message: GenerateResponse): GenerateEvent | undefined {
  return message.event === undefined ? undefined : (message as GenerateEvent);
}

function healthStatus({ status }: HealthCheckResponse): HealthStatus {
  return (HealthCheckResponse_ServingStatus[status] ?? "UNKNOWN") as HealthStatus;
}

function credentialsOf(tls: boolean | Tls): ChannelCredentials {
  if (tls === false) return grpcCredentials.createInsecure();
  const { ca, certificate, key } = tls === true ? {} : tls;
  return grpcCredentials.createSsl(ca ?? null, key ?? null, certificate ?? null);
}
