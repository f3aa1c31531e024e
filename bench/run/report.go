package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"
)

const preamble = `# Results

Written by ` + "`go run ./bench/run -registry REGISTRY`" + `, a measure at a time; each section says when, on what
and with which varve. REGISTRY is a plain-HTTP registry on the loopback interface with the images of the
corpus script. Ours and the rival take turns within one run; n is the number of turns; medians unless said
otherwise. The machine has other users: trust ratios and minima before absolute times.
`

// replaceSection puts text under a heading of the results, in place of what was
// there.
func replaceSection(path, title, text string) error {
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	parts := strings.Split("\n"+string(old), "\n## ")
	parts[0] = preamble
	part := title + "\n\n" + strings.TrimSpace(text) + "\n"
	i := slices.IndexFunc(parts, func(p string) bool { return strings.HasPrefix(p, title+"\n") })
	if i > 0 {
		parts[i] = part
	} else {
		parts = append(parts, part)
	}
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i]) + "\n"
	}
	return os.WriteFile(path, []byte(strings.Join(parts, "\n## ")), 0o644)
}

// machine says where and when a section was measured.
func (b *bench) machine(ctx context.Context) string {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	rev, _ := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty").Output()
	return fmt.Sprintf("%s; varve %s (%s, CGO_ENABLED=0, -s -w); kernel %s, %d CPUs; load average %s.",
		time.Now().UTC().Format("2006-01-02 15:04 UTC"), strings.TrimSpace(string(rev)), runtime.Version(),
		strings.TrimSpace(string(kernel)), runtime.NumCPU(), strings.Join(strings.Fields(string(load))[:3], " "))
}

// median of a copy; the mean of the middle two where they are even.
func median[T ~int64 | ~float64](v []T) T {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

func lowest[T ~int64 | ~float64](v []T) T {
	if len(v) == 0 {
		return 0
	}
	return slices.Min(v)
}

// verdict says whether a figure keeps to its target.
func verdict(got, atMost float64) string {
	if got <= atMost {
		return "reached"
	}
	return "missed"
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/1e6) }
func mib(n int64) string        { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }
func mb(n int64) string         { return fmt.Sprintf("%.2f", float64(n)/1e6) }

func all[T any](v []T, show func(T) string) string {
	s := make([]string, len(v))
	for i, x := range v {
		s[i] = show(x)
	}
	return strings.Join(s, " ")
}

// pause is the beat of waiting for something.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(5 * time.Millisecond):
		return nil
	}
}
