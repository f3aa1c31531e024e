package index

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// asked starts a lookup that must wait, and gives where its answer comes.
func asked(t *testing.T, g *Growing, dir uint64, name string) <-chan error {
	t.Helper()
	if _, err := g.Lookup(over, dir, name); err != ErrCanceled {
		t.Fatalf("%q: %v, and not a wait", name, err)
	}
	answer := make(chan error, 1)
	go func() {
		_, err := g.Lookup(nil, dir, name)
		answer <- err
	}()
	return answer
}

func answers(t *testing.T, answer <-chan error, want error) {
	t.Helper()
	select {
	case err := <-answer:
		if !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	case <-time.After(time.Minute):
		t.Error("no answer")
	}
}

func add(t *testing.T, g *Growing, layer int, es ...Entry) {
	t.Helper()
	for _, e := range es {
		if err := g.Add(layer, e); err != nil {
			t.Fatal(err)
		}
	}
}

// TestGrowingSettles says when a wait ends: as soon as it can.
func TestGrowingSettles(t *testing.T) {
	for _, test := range []struct {
		name   string
		lower  []Entry // complete from the start
		before []Entry // of the layer above, before the lookup
		look   string
		after  []Entry // that settle it
		want   error
	}{
		{"the name", nil, nil, "a", []Entry{file("a")}, nil},
		{"its directory and the name", []Entry{dir("d")}, []Entry{dir("d")}, "d/a", []Entry{file("d/a")}, nil},
		{"a directory once it is listed", []Entry{dir("d")}, []Entry{file("d/a")}, "d", []Entry{dir("d")}, nil},
		{"a whiteout", []Entry{file("a")}, nil, "a", []Entry{file(".wh.a")}, ErrNotExist},
		{"nothing but the end", []Entry{file("a")}, []Entry{file("b")}, "c", nil, ErrNotExist},
		{"a hard link to what is there", []Entry{file("a")}, nil, "b", []Entry{hard("b", "a")}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := NewGrowing(2)
			if err := g.AddAll(0, test.lower); err != nil {
				t.Fatal(err)
			}
			add(t, g, 1, test.before...)
			dir, base := splitPath(test.look)
			parent, _, err := walkTo(g, over, dir)
			if err != nil {
				t.Fatal(err)
			}
			answer := asked(t, g, parent.ID, base)
			time.Sleep(10 * time.Millisecond)
			add(t, g, 1, test.after...)
			if test.after == nil {
				g.Complete(1)
			}
			answers(t, answer, test.want)
		})
	}
	t.Run("a directory's cover", func(t *testing.T) {
		g := NewGrowing(3)
		add(t, g, 2, dir("d"))
		g.Complete(2)
		add(t, g, 0, file("d/a"))
		g.Complete(0)
		d, _, err := walkTo(g, over, "d")
		if err != nil {
			t.Fatal(err)
		}
		answer := asked(t, g, d.ID, "a")
		add(t, g, 1, file("d")) // hides what is below
		answers(t, answer, ErrNotExist)
	})
}

// TestGrowingWant says whose entries are waited for where one layer waits for
// another.
func TestGrowingWant(t *testing.T) {
	g := NewGrowing(2)
	told := make(chan string, 9)
	g.Want = func(layer int) func() {
		told <- fmt.Sprint("want ", layer)
		return func() { told <- fmt.Sprint("done ", layer) }
	}
	if err := g.AddAll(1, []Entry{hard("b", "a"), file("c")}); err != nil {
		t.Fatal(err)
	}
	_, err := g.Lookup(over, 1, "c")
	if err != ErrCanceled {
		t.Errorf("what follows a hard link that is not settled: %v", err)
	}
	add(t, g, 0, file("a"))
	g.Complete(0)
	for _, name := range []string{"b", "c"} {
		if _, err := g.Lookup(over, 1, name); err != nil {
			t.Error(name, err)
		}
	}
	close(told)
	var all []string
	for s := range told {
		all = append(all, s)
	}
	if want := []string{"want 0", "done 0"}; !slices.Equal(all, want) {
		t.Errorf("told %q, want %q", all, want)
	}
}

func TestGrowingFails(t *testing.T) {
	g := NewGrowing(1)
	add(t, g, 0, file("a"))
	answer := asked(t, g, 1, "b")
	bad := errors.New("the registry is gone")
	g.Fail(bad)
	g.Fail(errors.New("another"))
	answers(t, answer, bad)
	_, err := g.Root()
	_, lookup := g.Lookup(nil, 1, "a")
	list := g.ReadDir(1, 0, func(string, GrowingNode, uint64) bool { return true })
	for what, err := range map[string]error{"root": err, "lookup": lookup, "list": list, "add": g.Add(0, file("c")), "the rest": g.AddAll(0, nil)} {
		if !errors.Is(err, bad) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestGrowingListing lists name by name while names come, some of them twice and
// in several layers.
func TestGrowingListing(t *testing.T) {
	g := NewGrowing(3)
	seen := map[string]int{}
	cookie := uint64(0)
	one := func() (some bool) {
		if err := g.ReadDir(1, cookie, func(name string, _ GrowingNode, next uint64) bool {
			if next <= cookie {
				t.Fatalf("from %d to %d", cookie, next)
			}
			seen[name], cookie, some = seen[name]+1, next, true
			return false
		}); err != nil {
			t.Fatal(err)
		}
		return some
	}
	r := rand.New(rand.NewPCG(4, 4))
	for i := range 300 {
		n := r.IntN(60)
		e := file(fmt.Sprint(n))
		if n%2 == 0 {
			e = dir(fmt.Sprint(n))
		}
		add(t, g, r.IntN(3), e)
		if i%3 == 0 {
			one()
		}
	}
	for one() {
	}
	for name, n := range seen {
		if n != 1 {
			t.Errorf("%s was listed %d times", name, n)
		}
	}
	for _, d := range listGrowing(t, g, 1) {
		if seen[d.name] == 0 {
			t.Errorf("%s was not listed", d.name)
		}
	}
	add(t, g, 1, file(whiteoutOpaque))
	add(t, g, 0, file("hidden"))
	add(t, g, 2, file("last"), file(".wh.1"))
	if !one() || one() || seen["last"] != 1 {
		t.Errorf("what came after the end: %d", seen["last"])
	}
	for _, d := range listGrowing(t, g, 1) {
		if d.name == "1" || d.name == "hidden" {
			t.Errorf("%s is listed", d.name)
		}
	}
}

func TestGrowingRefuses(t *testing.T) {
	for _, test := range []struct {
		name   string
		layers [][]Entry
		want   string
	}{
		{"hard link to nothing", [][]Entry{{hard("a", "b")}}, `hard link "a" to "b"`},
		{"hard link to a directory", [][]Entry{{dir("d"), hard("a", "d")}}, "directory"},
		{"hard link over the way to another's target", [][]Entry{{hard("p", "z"), hard("y", "p/q"), file("p/q"), file("z")}}, "in whose place"},
		{"whiteout of dots", [][]Entry{{file("a/.wh...")}}, "whiteout"},
		{"a symlink's long name as a parent", [][]Entry{{link("s", strings.Repeat("n", 300)), file("s/f")}}, "300 bytes"},
		{"symlinks that lead too deep", [][]Entry{{link("s", strings.Repeat("d/", 600)+"t"), link(strings.Repeat("d/", 600)+"t", strings.Repeat("e/", 600)), file("s/f")}}, "in one another"},
		{"too many implied directories", [][]Entry{implied(300, 1000)}, "does not list"},
		{"a root that is a file", [][]Entry{{file("")}}, "root"},
		{"too many bytes", [][]Entry{{link("a", strings.Repeat("x", MaxMeta))}}, "bytes of names"},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := NewGrowing(len(test.layers))
			var err error
			for l, es := range test.layers {
				if err == nil {
					err = g.AddAll(l, es)
				}
			}
			_, after := g.Root()
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), test.want) || after != err {
				t.Errorf("got %v, and then %v, want %q", err, after, test.want)
			}
		})
	}
	if err := NewGrowing(1).AddAll(0, make([]Entry, MaxEntries+1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("too many entries: %v", err)
	}
}

// What grows with the square of a layer's entries keeps every mount waiting.
func TestGrowingInLinearTime(t *testing.T) {
	var chain, opaque []Entry
	const n = 30_000
	for i := range n {
		chain = append(chain, hard(fmt.Sprint(n-i), fmt.Sprint(n-i-1)))
		opaque = append(opaque, file(fmt.Sprintf("d/%d", i)), file("d/.wh..wh..opq"))
	}
	g := NewGrowing(2)
	for l, es := range [][]Entry{append(chain, file("0")), opaque} {
		if err := g.AddAll(l, es); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := g.Lookup(over, 1, "7"); err != nil || n.Nlink != 30_001 {
		t.Errorf("%+v, %v", n, err)
	}
}
