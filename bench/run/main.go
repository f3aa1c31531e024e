// Command run measures varve against what it promises: round trips of a cold
// mount, walks beside ext4, memory, and bytes on the wire. It builds the varve of
// this checkout, gives it stores and daemons of its own, and writes each measure's
// section of bench/RESULTS.md, with the figures in results.json and plots of them
// beside it.
//
//	go run ./bench/run -registry HOST:PORT [MEASURE...]
//	go run ./bench/run compare OLD.json NEW.json
//	go run ./bench/run plot RESULTS.json DIR
//
// The measures are coldmount, walk, memory, bytes, write, commit, pass, checkpoints,
// indexsize, shared, starts, whole, second, load, local, ctr, atonce and idle; none
// named is all of them, "containers" the last three, and "table" those that are held
// against other systems, whose results begin the file. It needs root, FUSE, a registry with the images of the corpus, and the
// programs that a measure asks for if they are not there. Conversions are pushed
// beside the images, as tag estargz; copies to be indexed go to repositories of
// their own.
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
	"slices"
	"strings"
	"syscall"
	"time"
)

// needs says what a registry must have; it is part of errors.
const needs = "a plain-HTTP registry, such as Debian's docker-registry, with the images that the corpus script build.sh pushes as NAME:plain"

// bench is one invocation.
type bench struct {
	registry string
	dir      string   // scratch: stores, conversions, the tree on ext4
	out      string   // the results
	n        int      // repetitions where the measure has no number of its own
	asked    bool     // n was asked for
	images   []string // where the measure has no others of its own
	local    localOptions
	varve    string   // the binary under test
	rivals   rivals   // and what it is measured beside
	only     []string // ways to start, where not all are wanted
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
	{"pass", "First mount without an index", (*bench).pass},
	{"checkpoints", "Points beside decompression alone", (*bench).checkpoints},
	{"indexsize", "Size of indexes, and loading them", (*bench).indexSize},
	{"shared", "A pushed index beside eStargz", (*bench).shared},
	{"starts", "Cold starts", (*bench).starts},
	{"whole", "Whole images, cold", (*bench).whole},
	{"second", "Second starts", (*bench).second},
	{"load", "The daemon under a walk and a whole read", (*bench).underLoad},
	{localMeasure, "Local reads beside ext4", (*bench).localReads},
	{ctrMeasure, "Containers of containerd, cold", (*bench).ctr},
	{atOnceMeasure, "32 containers at once", (*bench).atOnce},
	{idleMeasure, "20 idle images", (*bench).idle},
}

// verbs are what this program does besides measuring.
var verbs = map[string]func(args []string) error{
	decompressVerb: decompressOnce,
	readVerb:       readOnce,
	compareVerb:    compareFiles,
	plotVerb:       plotFile,
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
	if len(args) > 0 && verbs[args[0]] != nil {
		return verbs[args[0]](args[1:])
	}
	b := &bench{}
	var images, only string
	f := flag.NewFlagSet("run", flag.ContinueOnError)
	f.StringVar(&b.registry, "registry", "", "HOST:PORT of "+needs)
	f.StringVar(&b.dir, "dir", "/var/tmp/varve-bench", "scratch directory, on ext4 for the walks; the copied tree and layers stay there")
	f.StringVar(&b.out, "out", "bench/RESULTS.md", "results file, whose section is replaced")
	f.IntVar(&b.n, "n", 5, "repetitions; some measures have another number by themselves")
	f.StringVar(&images, "images", "", "images of the measures bytes, pass, checkpoints, indexsize, shared, starts, whole, second, load, ctr and atonce, instead of their own choice")
	f.IntVar(&b.local.files, "files", manyFilesCount, "regular files in the image of many small ones, of the measure local")
	f.IntVar(&b.local.megabytes, "mib", 2048, "MiB of the large file of the measure local")
	f.StringVar(&b.local.fuseOverlayfs, "fuse-overlayfs", "", "the program, a rival of the measure local; \"\" takes the one in PATH, if there is one")
	f.StringVar(&only, "only", "", "of starts, whole, second, load and ctr, the ways that have one of these texts in their names, \"SYSTEM: FORM\"")
	b.rivals.flags(f)
	if err := f.Parse(args); err != nil {
		return err
	}
	if b.registry == "" {
		return errors.New("-registry HOST:PORT is missing: it names " + needs)
	}
	if os.Geteuid() != 0 {
		return errors.New("this needs root: it drops caches, mounts EROFS and overlays, and changes roots")
	}
	given := ""
	f.Visit(func(f *flag.Flag) {
		b.asked = b.asked || f.Name == "n"
		if slices.Contains([]string{"n", "images", "files", "mib"}, f.Name) {
			given += " -" + f.Name + " " + f.Value.String()
		}
	})
	if images != "" {
		b.images = strings.Split(images, ",")
	}
	if only != "" {
		b.only = strings.Split(only, ",")
	}
	if err := b.rivals.find(); err != nil {
		return err
	}
	chosen, err := choose(f.Args())
	if err != nil {
		return err
	}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for _, m := range chosen {
		b.say("== %s", m.name)
		var s section
		s.line("%s `go run ./bench/run -registry REGISTRY%s %s` repeats it.", b.machine(ctx), given, m.name)
		s.line("")
		if err := m.run(b, ctx, &s); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		if err := replaceSection(b.out, m.title, s.String()); err != nil {
			return err
		}
		if f := takeRecorded(); f != nil {
			if err := replaceFigures(resultsPath(b.out), figures{Name: m.name, Machine: b.machine(ctx), Figures: f}); err != nil {
				return err
			}
			if err := b.summed(); err != nil {
				return err
			}
		}
		fmt.Print("\n## ", m.title, "\n\n", s.String(), "\n")
	}
	return nil
}

// choose gives the measures of these names, in the order of the results.
func choose(names []string) (chosen []measure, err error) {
	known := []string{"all", tableVerb, containersVerb}
	for verb, of := range map[string][]string{tableVerb: tableMeasures, containersVerb: containerMeasures} {
		if slices.Contains(names, verb) {
			names = append(slices.Clone(names), of...)
		}
	}
	for _, m := range measures {
		known = append(known, m.name)
		if len(names) == 0 || slices.Contains(names, "all") || slices.Contains(names, m.name) {
			chosen = append(chosen, m)
		}
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return nil, fmt.Errorf("%q: want some of %s", n, strings.Join(known, ", "))
		}
	}
	return chosen, nil
}

// imagesOr gives the images that were asked for, or the measure's own.
func (b *bench) imagesOr(own ...string) []string {
	if b.images != nil {
		return b.images
	}
	return own
}

// turns is how often a measure repeats that wants its own number.
func (b *bench) turns(own int) int {
	if b.asked {
		return b.n
	}
	return own
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
