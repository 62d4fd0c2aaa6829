/** From what is handy to write to the contract's messages. Knows nothing of calls. */

import {
  ChatInput,
  CountTokensRequest,
  GenerateRequest,
  TokenizeRequest,
} from "./gen/bear_grpc/v1/inference_service.js";
import type { Duration } from "./gen/google/protobuf/duration.js";

/** What a message may be made from: every field may be left out, and what is left out stays unset. */
export type Partially<Type extends { fromPartial(object: never): unknown }> = Parameters<
  Type["fromPartial"]
>[0];

/** One message of a conversation. */
export interface Message {
  /** `system`, `user`, `assistant`, or whatever the model's template knows. */
  role: string;
  content: string;
}

/** A conversation and how the model's template renders it. */
export interface Chat {
  /** Oldest first. */
  messages: readonly Message[];
  /** Whether the template opens the assistant's turn at the end. Default: true. */
  addGenerationPrompt?: boolean;
  /** More variables for the template, such as `enable_thinking`. */
  templateKwargs?: Record<string, unknown>;
}

/** Text, ready tokens or a conversation: one of them. */
export type Input =
  | { prompt: string; tokenIds?: never; messages?: never }
  | { tokenIds: readonly number[]; prompt?: never; messages?: never }
  | (Chat & { prompt?: never; tokenIds?: never });

/** What to generate: the contract's `GenerateRequest` with its input written flat. */
export type GenerateParams = { model: string } & Omit<Partially<typeof GenerateRequest>, "model" | "input"> &
  Input;

/** A protobuf duration; negative ones mean "never" where the contract says so. */
export function duration(seconds: number): Duration {
  const whole = Math.trunc(seconds);
  return { seconds: whole, nanos: Math.round((seconds - whole) * 1e9) };
}

export function toChatInput({ messages, addGenerationPrompt, templateKwargs }: Chat): ChatInput {
  return {
    messages: messages.map(({ role, content }) => ({
      role,
      content: [{ part: { $case: "text", text: content } }],
    })),
    addGenerationPrompt,
    templateKwargs,
  };
}

export function toGenerateRequest(params: GenerateParams): GenerateRequest {
  const { prompt, tokenIds, messages, addGenerationPrompt, templateKwargs, ...rest } =
    params as GenerateParams & Partial<Chat>;
  // The wire holds one input; sending the last one written would hide the mistake.
  const given = Object.entries({ prompt, tokenIds, messages }).filter(([, value]) => value !== undefined);
  if (given.length > 1)
    throw new TypeError(`only one input can be given, not ${given.map(([name]) => name).join(" and ")}`);
  const request = GenerateRequest.fromPartial(rest);
  if (prompt !== undefined) request.input = { $case: "prompt", prompt };
  if (tokenIds !== undefined) request.input = { $case: "tokenIds", tokenIds: { ids: [...tokenIds] } };
  if (messages !== undefined) {
    const chat: Chat = { messages };
    if (addGenerationPrompt !== undefined) chat.addGenerationPrompt = addGenerationPrompt;
    if (templateKwargs !== undefined) chat.templateKwargs = templateKwargs;
    request.input = { $case: "chat", chat: toChatInput(chat) };
  }
  return request;
}

/** How a text is tokenized; none of it is used for a conversation but `includePieces`. */
export type TokenizeParams = Omit<Partially<typeof TokenizeRequest>, "model" | "input">;

export function toTokenizeRequest(
  model: string,
  input: string | Chat,
  params: TokenizeParams,
): TokenizeRequest {
  const request = TokenizeRequest.fromPartial({ ...params, model });
  request.input =
    typeof input === "string" ? { $case: "text", text: input } : { $case: "chat", chat: toChatInput(input) };
  return request;
}

export function toCountTokensRequest(model: string, input: string | Chat): CountTokensRequest {
  return {
    model,
    input:
      typeof input === "string"
        ? { $case: "prompt", prompt: input }
        : { $case: "chat", chat: toChatInput(input) },
  };
}
