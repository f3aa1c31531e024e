# Two commands: `make demo` shows the main job, `make test` passes the tests. Both
# install what is missing.
GO ?= go
BIN := bin/varve
VERSION ?= 0.1.0-dev

.PHONY: build deps demo test lint bench clean
build:
	$(GO) build -trimpath -ldflags "-X github.com/varvefs/varve/metrics.Version=$(VERSION)" -o $(BIN) ./cmd/varve

deps:
	./scripts/deps

demo: deps build
	$(BIN) demo

test: deps
	./scripts/test

lint:
	./scripts/lint

clean:
	rm -rf bin
