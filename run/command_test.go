package run

import (
	"errors"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestCommand(t *testing.T) {
	words := func(w ...string) *[]string { return &w }
	for _, c := range []struct {
		name             string
		entry            *[]string
		cmd              []string
		imgEntry, imgCmd []string
		want             []string
	}{
		{name: "the image's", imgEntry: []string{"e"}, imgCmd: []string{"c"}, want: []string{"e", "c"}},
		{name: "the image's command", imgCmd: []string{"c", "d"}, want: []string{"c", "d"}},
		{name: "a command", cmd: []string{"x"}, imgEntry: []string{"e"}, imgCmd: []string{"c"}, want: []string{"e", "x"}},
		{name: "an entrypoint takes the command away", entry: words("n"), imgEntry: []string{"e"}, imgCmd: []string{"c"}, want: []string{"n"}},
		{name: "both", entry: words("n"), cmd: []string{"x"}, imgEntry: []string{"e"}, imgCmd: []string{"c"}, want: []string{"n", "x"}},
		{name: "no entrypoint", entry: words(), cmd: []string{"x"}, imgEntry: []string{"e"}, want: []string{"x"}},
		{name: "docker's empty word", entry: words(""), cmd: []string{"x"}, imgEntry: []string{"e"}, want: []string{"x"}},
		{name: "no entrypoint and no command", entry: words(), imgEntry: []string{"e"}, imgCmd: []string{"c"}},
		{name: "nothing"},
		{name: "an empty word", cmd: []string{""}},
	} {
		got, err := Command(Options{Entrypoint: c.entry, Cmd: c.cmd}, ocispec.ImageConfig{Entrypoint: c.imgEntry, Cmd: c.imgCmd})
		if d := cmp.Diff(c.want, got); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
		if want := c.want == nil; errors.Is(err, ErrNoCommand) != want {
			t.Errorf("%s: error %v", c.name, err)
		}
	}
}

func TestStopSignal(t *testing.T) {
	for _, c := range []struct {
		opt, img string
		want     syscall.Signal
		wrong    bool
	}{
		{want: syscall.SIGTERM},
		{img: "SIGQUIT", want: syscall.SIGQUIT},
		{img: "nonsense", want: syscall.SIGTERM},
		{opt: "int", img: "SIGQUIT", want: syscall.SIGINT},
		{opt: "9", want: syscall.SIGKILL},
		{opt: "SIGRTMIN+3", want: 37},
		{opt: "rtmin", want: 34},
		{opt: "RTMAX-1", want: 63},
		{opt: "64", want: 64},
		{opt: "0", wrong: true}, {opt: "65", wrong: true}, {opt: "-1", wrong: true}, {opt: "foo", wrong: true},
		{opt: "RTMIN+31", wrong: true}, {opt: "RTMIN-1", wrong: true}, {opt: "RTMAX+1", wrong: true}, {opt: "RTMIN3", wrong: true}, {opt: "SIG", wrong: true},
	} {
		got, err := StopSignal(Options{StopSignal: c.opt}, ocispec.ImageConfig{StopSignal: c.img})
		if (err != nil) != c.wrong || got != c.want && !c.wrong {
			t.Errorf("%q over %q: %v, %v", c.opt, c.img, got, err)
		}
	}
}
