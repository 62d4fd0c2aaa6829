"""The gRPC face: servicers, conversion, health. The only users of the generated code but for clients."""
