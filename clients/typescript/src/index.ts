export { BearClient, type BearClientOptions, type GenerateEvent, type HealthStatus, type Tls } from "./client.js";
export type { CallOptions, StreamMethod, UnaryMethod } from "./connection.js";
export { BearError, type Code, type KnownReason, Reason, type Violation } from "./errors.js";
export {
  type Chat,
  duration,
  type GenerateParams,
  type Input,
  type Message,
  type Partially,
} from "./messages.js";

export * from "./gen/bear_grpc/v1/errors.js";
export * from "./gen/bear_grpc/v1/inference_service.js";
export * from "./gen/bear_grpc/v1/model_service.js";
export * from "./gen/bear_grpc/v1/server_service.js";
export * from "./gen/bear_grpc/v1/types.js";
