"""The generated code of the protobuf package `bear_grpc.v1`: never edited, see `make proto`."""
