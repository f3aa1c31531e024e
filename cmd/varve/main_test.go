package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/varvefs/varve/daemon"
)

func TestMessage(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want string
		exit int
	}{
		{nil, "", 0},
		{errors.New("plain"), "plain", 1},
		{errors.Join(errors.New("one"), errors.New("two")), "one; two", 1},
		{errors.New("a\r\n\n b\tc\n"), "a; b c", 1},
		{errors.New("\x1b[31mred\x1b]0;title\a\u009b2J\x7f\x00"), "[31mred]0;title2J", 1},
		{errors.New("raw \x9b2J"), "raw \ufffd2J", 1},
		{fmt.Errorf("the daemon went away: %w", context.Canceled), "interrupted", 130},
		{&daemon.Error{Message: "pull x: context canceled", Exit: 130}, "interrupted", 130},
		{usageError{errors.New("no")}, "no", 2},
		{&daemon.Error{Exit: 7}, "", 7}, // said already
	} {
		if got := message(tt.err); got != tt.want || exitCode(tt.err) != tt.exit {
			t.Errorf("%v: %q, exit %d, want %q, %d", tt.err, got, exitCode(tt.err), tt.want, tt.exit)
		}
	}
}

// drive runs the command against a daemon of the test's own at a socket.
func drive(ctx context.Context, t *testing.T, h http.Handler, args ...string) error {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(l) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	root := newRoot()
	root.SetArgs(append([]string{"--root", t.TempDir(), "--host", "unix://" + socket}, args...))
	return root.ExecuteContext(ctx)
}

func idOf(dir string) string { return "id" + strings.ReplaceAll(dir, "/", "_") }

// mounted is a daemon with mounts; answer gives the exit code of unmounting one.
func mounted(t *testing.T, asked *[]string, answer func(id string) int, dirs ...string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/mounts", func(w http.ResponseWriter, r *http.Request) {
		ms := make([]daemon.Mount, 0, len(dirs))
		for _, d := range dirs {
			ms = append(ms, daemon.Mount{ID: idOf(d), Dir: d})
		}
		json.NewEncoder(w).Encode(ms)
	})
	mux.HandleFunc("POST /v1/unmount", func(w http.ResponseWriter, r *http.Request) {
		var o daemon.UnmountOptions
		if err := json.NewDecoder(r.Body).Decode(&o); err != nil {
			t.Error(err)
		}
		*asked = append(*asked, o.Mount)
		if exit := answer(o.Mount); exit != 0 {
			w.WriteHeader(http.StatusBadRequest)
			json.NewEncoder(w).Encode(daemon.Error{Message: "it is so", Exit: exit})
			return
		}
		json.NewEncoder(w).Encode(o.Mount)
	})
	return mux
}

func TestUmountAll(t *testing.T) {
	dirs := []string{"/m", "/m/b", "/m-other", "/m/b/c", "/m/a"}
	for _, tt := range []struct {
		name  string
		codes map[string]int
		want  int
	}{
		{"all there", nil, 0},
		{"one gone meanwhile", map[string]int{idOf("/m/b"): daemon.ExitNotFound}, 0},
		{"one busy", map[string]int{idOf("/m/b"): daemon.ExitBusy, idOf("/m/a"): daemon.ExitNotFound}, daemon.ExitBusy},
	} {
		var asked []string
		err := drive(t.Context(), t, mounted(t, &asked, func(id string) int { return tt.codes[id] }, dirs...), "umount", "--all")
		if exitCode(err) != tt.want || message(err) != "" {
			t.Errorf("%s: exit %d, %v", tt.name, exitCode(err), err)
		}
		if len(asked) != len(dirs) {
			t.Errorf("%s: asked %q", tt.name, asked)
		}
		at := func(dir string) int { return slices.Index(asked, idOf(dir)) }
		if at("/m/b/c") > at("/m/b") || at("/m/b") > at("/m") || at("/m/a") > at("/m") {
			t.Errorf("%s: order %q", tt.name, asked)
		}
	}
	// One that was named must be there.
	var asked []string
	err := drive(t.Context(), t, mounted(t, &asked, func(string) int { return daemon.ExitNotFound }), "umount", "x")
	if exitCode(err) != daemon.ExitNotFound {
		t.Errorf("named: %v", err)
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var asked []string
	h := mounted(t, &asked, func(string) int { cancel(); return daemon.ExitBusy }, "/a", "/b", "/c")
	err := drive(ctx, t, h, "umount", "--all", "--force")
	if message(err) != "interrupted" || exitCode(err) != 130 {
		t.Errorf("umount: %v, exit %d", err, exitCode(err))
	}
	if d := cmp.Diff([]string{idOf("/c")}, asked); d != "" {
		t.Errorf("went on: %s", d)
	}
	err = drive(ctx, t, h, "ps")
	if message(err) != "interrupted" || exitCode(err) != 130 {
		t.Errorf("ps: %v, exit %d", err, exitCode(err))
	}
}

func TestEmptyDir(t *testing.T) {
	err := drive(t.Context(), t, http.NotFoundHandler(), "mount", "debian:12", "")
	if exitCode(err) != daemon.ExitUsage || message(err) != "DIR is empty" {
		t.Errorf("%v, exit %d", err, exitCode(err))
	}
}
