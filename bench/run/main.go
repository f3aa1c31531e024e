// Command run measures varve against what it promises: round trips of a cold
// mount, walks beside ext4, memory, and bytes on the wire. It builds the varve of
// this checkout, gives it stores and daemons of its own, and writes each measure's
// section of bench/RESULTS.md.
//
//	go run ./bench/run -registry HOST:PORT [coldmount|walk|memory|bytes|write|commit|all]
//
// It needs root, FUSE, strace, and a registry with the images of the corpus.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// needs says what a registry must have; it is part of errors.
const needs = "a plain-HTTP registry, such as Debian's docker-registry, with the images that the corpus script build.sh pushes as NAME:plain"

// bench is one invocation.
type bench struct {
	registry string
	dir      string // scratch: stores, conversions, the tree on ext4
	out      string // the results
	n        int    // repetitions where the measure does not ask for more
	images   []string
	varve    string // the binary under test
	log      *os.File
}

// section is what a measure has to say.
type section struct {
	strings.Builder
}

func (s *section) line(format string, args ...any) { fmt.Fprintf(s, format+"\n", args...) }

type measure struct {
	name, title string
	run         func(*bench, context.Context, *section) error
}

var measures = []measure{
	{"coldmount", "Cold mount and second mount", (*bench).coldmount},
	{"walk", "Walks beside ext4", (*bench).walk},
	{"memory", "Memory of the daemon", (*bench).memory},
	{"bytes", "Bytes on the wire", (*bench).bytes},
	{"write", "Writable mounts beside overlayfs and fuse-overlayfs", (*bench).write},
	{"commit", "Commit beside tar, pigz and sha256sum", (*bench).commit},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	b := &bench{}
	var images string
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	f.StringVar(&b.registry, "registry", "", "HOST:PORT of "+needs)
	f.StringVar(&b.dir, "dir", "/var/tmp/varve-bench", "scratch directory, on ext4 for the walks; the copied tree stays there")
	f.StringVar(&b.out, "out", "bench/RESULTS.md", "results file, whose section is replaced")
	f.IntVar(&b.n, "n", 5, "repetitions")
	f.StringVar(&images, "images", "debian,python,node,nginx,redis,jdk,gcc,large", "images of the measure bytes")
	if err := f.Parse(args); err != nil {
		return err
	}
	if b.registry == "" {
		return errors.New("-registry HOST:PORT is missing: it names " + needs)
	}
	if os.Geteuid() != 0 {
		return errors.New("this needs root: it drops caches, mounts EROFS and overlays, and changes roots")
	}
	b.images = strings.Split(images, ",")
	which := f.Arg(0)
	if which == "" {
		which = "all"
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	found := false
	for _, m := range measures {
		if which != "all" && which != m.name {
			continue
		}
		found = true
		b.say("== %s", m.name)
		var s section
		s.line("%s", b.machine(ctx))
		s.line("")
		if err := m.run(b, ctx, &s); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if err := replaceSection(b.out, m.title, s.String()); err != nil {
			return err
		}
		fmt.Print("\n## ", m.title, "\n\n", s.String(), "\n")
	}
	if !found {
		return fmt.Errorf("%q: want coldmount, walk, memory, bytes, write, commit or all", which)
	}
	return nil
}

// prepare makes the scratch directory and builds the varve of this checkout as
// the Makefile does.
func (b *bench) prepare(ctx context.Context) (err error) {
	if b.dir, err = filepath.Abs(b.dir); err != nil {
		return err
	}
	tmp := filepath.Join(b.dir, "tmp")
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return err
	}
	os.Setenv("TMPDIR", tmp) // conversions write layers there
	for _, v := range os.Environ() {
		if k, _, _ := strings.Cut(v, "="); strings.HasPrefix(k, "VARVE_") {
			os.Unsetenv(k)
		}
	}
	if b.log, err = os.OpenFile(filepath.Join(b.dir, "bench.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
		return err
	}
	b.varve = filepath.Join(b.dir, "varve")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", b.varve, "./cmd/varve")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build varve, from the root of the checkout: %w: %s", err, out)
	}
	return nil
}

// say tells of progress; every single figure goes to the log as well.
func (b *bench) say(format string, args ...any) {
	s := time.Now().Format("15:04:05 ") + fmt.Sprintf(format, args...) + "\n"
	os.Stderr.WriteString(s)
	b.log.WriteString(s)
}
