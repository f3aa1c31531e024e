package main

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/run"
	"github.com/varvefs/varve/run/monitor"
)

func TestFailed(t *testing.T) {
	for _, tt := range []struct {
		err  error
		code int
		says string
	}{
		{nil, 0, ""},
		{errors.New("plain"), 125, "plain"},
		{usageError{errors.New("usage")}, 125, "usage"},
		{&daemon.Error{Message: "No such image: x", Exit: daemon.ExitNotFound}, 125, "No such image: x"},
		{&daemon.Error{Message: "not there", Exit: 127}, 127, "not there"},
		{fmt.Errorf("start: %w", &monitor.StartError{Code: 126, Message: "denied"}), 126, "start: denied"},
		{exited(1), 1, ""},
		{exited(130), 130, ""}, // of what ran, and nothing interrupted us
		{exitedWith{exited(1), "no TTY"}, 1, "no TTY"},
		{&daemon.Error{Message: "context canceled", Exit: 130}, 130, "interrupted"},
	} {
		if err := failed(tt.err); exitCode(err) != tt.code || message(err) != tt.says {
			t.Errorf("%v: exit %d, %q", tt.err, exitCode(err), message(err))
		}
	}
}

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for s, want := range map[string]time.Time{
		"":                                    {},
		"10m":                                 now.Add(-10 * time.Minute),
		"1h30m":                               now.Add(-90 * time.Minute),
		"1136073845":                          time.Unix(1136073845, 0),
		"1136073845.000000001":                time.Unix(1136073845, 1),
		"2006-01-02T15:04:05Z":                time.Date(2006, 1, 2, 15, 4, 5, 0, time.UTC),
		"2006-01-02T15:04:05.123456789+01:00": time.Date(2006, 1, 2, 14, 4, 5, 123456789, time.UTC),
		"2006-01-02T15:04:05":                 time.Date(2006, 1, 2, 15, 4, 5, 0, time.Local),
		"2006-01-02":                          time.Date(2006, 1, 2, 0, 0, 0, 0, time.Local),
	} {
		if got, err := parseTime(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"yesterday", "12:00", "1.2.3", "1136073845.x", "-"} {
		if got, err := parseTime(s, now); err == nil {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestProcessFlags(t *testing.T) {
	parse := func(args ...string) (o run.Options, err error) {
		f := pflag.NewFlagSet("run", pflag.ContinueOnError)
		f.Bool("help", false, "")
		apply := processFlags(f, &o)
		if err = f.Parse(args); err == nil {
			err = apply()
		}
		return o, err
	}
	o, err := parse("-it", "-m", "512m", "--memory-swap=-1", "--cpus=1.5", "-h", "box", "--entrypoint", "", "-l", "a=b=c", "-l", "d", "--cap-add", "A,B", "--stop-timeout", "3")
	switch {
	case err != nil:
		t.Fatal(err)
	case !o.TTY || !o.Interactive || o.Hostname != "box":
		t.Errorf("%+v", o)
	case o.Limits.Memory != 512<<20 || o.Limits.MemorySwap != -1 || o.Limits.CPUs != 1.5:
		t.Errorf("limits %+v", o.Limits)
	case o.Entrypoint == nil || len(*o.Entrypoint) != 0:
		t.Errorf("an entrypoint that was taken away: %v", o.Entrypoint)
	case o.Labels["a"] != "b=c" || o.Labels["d"] != "" || len(o.Labels) != 2:
		t.Errorf("labels %q", o.Labels)
	case len(o.Security.CapAdd) != 2 || *o.StopTimeout != 3:
		t.Errorf("%+v", o)
	}
	if o, err = parse(); err != nil || o.Entrypoint != nil || o.StopTimeout != nil || o.Network != run.NetworkHost {
		t.Errorf("no flags: %+v, %v", o, err)
	}
	for _, args := range [][]string{{"-m", "much"}, {"--memory-swap", "x"}, {"--cpus", "all"}, {"-l", "=x"}, {"--pids-limit", "1.5"}} {
		if _, err := parse(args...); err == nil {
			t.Errorf("%v is no error", args)
		}
	}
}
