package index

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// over is a cancel channel of somebody who does not wait.
var over = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// told is what matters of an inode. Tests give every entry an mtime of its own.
func told(e *Entry, layer int, nlink uint32) string {
	s := fmt.Sprintf("%o %d %q", e.Mode, e.Mtime, e.Link)
	if e.Type() != unix.S_IFDIR {
		s += fmt.Sprintf(" of layer %d, links=%d", layer, nlink)
	}
	return s
}

// mergedTree gives the paths of what Merge makes, and which share an inode.
func mergedTree(layers [][]Entry) (paths map[string]string, same map[string][]string, err error) {
	t, err := Merge(layers)
	if err != nil {
		return nil, nil, err
	}
	paths = map[string]string{}
	byInode := map[*inode][]string{}
	var walk func(path string, n *node)
	walk = func(path string, n *node) {
		in := n.inode
		paths[path] = told(&Entry{Mode: in.mode, Mtime: in.mtime, Link: in.link()}, int(in.layer), in.nlink)
		byInode[n.inode] = append(byInode[n.inode], path)
		for kid := range n.kids.all() {
			walk(strings.TrimPrefix(path+"/"+kid.name, "/"), kid)
		}
	}
	walk("", t.root)
	return paths, groups(byInode), nil
}

// grownTreeOf is mergedTree of a Growing that is complete.
func grownTreeOf(t *testing.T, g *Growing) (paths map[string]string, same map[string][]string) {
	t.Helper()
	paths = map[string]string{}
	byID := map[uint64][]string{}
	var walk func(path string, n GrowingNode)
	walk = func(path string, n GrowingNode) {
		paths[path] = told(n.Entry, n.Layer, n.Nlink)
		byID[n.ID] = append(byID[n.ID], path)
		if again, err := g.Node(n.ID); err != nil || !cmp.Equal(again, n) {
			t.Errorf("%q is %+v, and by its id %+v, %v", path, n, again, err)
		}
		if n.Entry.Type() != unix.S_IFDIR {
			return
		}
		for _, d := range listGrowing(t, g, n.ID) {
			kid, err := g.Lookup(over, n.ID, d.name)
			if err != nil || kid.ID != d.id {
				t.Errorf("%q in %q is %+v, %v, and %+v where it is listed", d.name, path, kid, err, d)
				continue
			}
			walk(strings.TrimPrefix(path+"/"+d.name, "/"), kid)
		}
	}
	root, err := g.Root()
	if err != nil {
		t.Fatal(err)
	}
	walk("", root)
	return paths, groups(byID)
}

func groups[K comparable](by map[K][]string) map[string][]string {
	same := map[string][]string{}
	for _, paths := range by {
		if len(paths) > 1 {
			slices.Sort(paths)
			same[paths[0]] = paths
		}
	}
	return same
}

type listed struct {
	name string
	id   uint64
}

func listGrowing(t *testing.T, g *Growing, dir uint64) (ls []listed) {
	t.Helper()
	if err := g.ReadDir(dir, 0, func(name string, n GrowingNode, _ uint64) bool {
		ls = append(ls, listed{name, n.ID})
		return true
	}); err != nil {
		t.Error(err)
	}
	return ls
}

// walkTo walks as a kernel does, by one lookup a name. at is the path to where it
// came.
func walkTo(g *Growing, cancel <-chan struct{}, path string) (n GrowingNode, at string, err error) {
	n, err = g.Root()
	for rest := path; rest != "" && err == nil; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		at = strings.TrimPrefix(at+"/"+part, "/")
		if n.Entry.Type() != unix.S_IFDIR {
			return n, at, ErrNotExist
		}
		n, err = g.Lookup(cancel, n.ID, part)
	}
	return n, at, err
}

// tangle makes layers with all that a tar may do, mostly what it should not.
func tangle(r *rand.Rand) (layers [][]Entry) {
	name := func() string {
		parts := make([]string, 1+r.IntN(3))
		for i := range parts {
			parts[i] = string(rune('a' + r.IntN(3)))
		}
		return strings.Join(parts, "/")
	}
	base := func(p, with string) string {
		dir, base := splitPath(p)
		return strings.TrimPrefix(dir+"/"+with+base, "/")
	}
	mtime := int64(1)
	var files []string
	for range 1 + r.IntN(4) {
		var es []Entry
		for range r.IntN(10) {
			var e Entry
			switch k := r.IntN(20); {
			case k < 5:
				e = dir(name())
			case k < 9:
				e = file(name())
				files = append(files, e.Name)
			case k < 11:
				e = link(name(), []string{"a", "b", "../a", "/b", "a/b", "../../c/./a", "."}[r.IntN(7)])
			case k < 14:
				e = hard(name(), name())
				if len(files) > 0 && r.IntN(8) > 0 {
					e.Link = files[r.IntN(len(files))]
				}
			case k < 17:
				e = file(base(name(), whiteout))
			case k < 19:
				dir, _ := splitPath(name())
				e = file(strings.TrimPrefix(dir+"/"+whiteoutOpaque, "/"))
			case r.IntN(3) == 0:
				e = dir("")
			default:
				e = file(base(name(), whiteoutMeta))
			}
			e.Mtime = mtime
			mtime++
			es = append(es, e)
		}
		layers = append(layers, es)
	}
	return layers
}

// tidy makes layers that say one thing of a name: nothing that passes undoes what
// has passed.
func tidy(r *rand.Rand) (layers [][]Entry) {
	mtime := int64(1)
	var files []string
	for range 1 + r.IntN(4) {
		var es []Entry
		kinds := map[string]uint32{} // of the layer's paths: 0 for what is no directory
		for range r.IntN(12) {
			parts := make([]string, 1+r.IntN(3))
			for i := range parts {
				parts[i] = string(rune('a' + r.IntN(4)))
			}
			name := strings.Join(parts, "/")
			kind, taken := kinds[name]
			e := dir(name)
			switch k := r.IntN(12); {
			case k < 4 && !(taken && kind == 2): // a directory that others only implied may be listed
				if taken && kind == 1 {
					taken = false
				}
				kind = 2
			case k < 7:
				e, kind = file(name), 0
				files = append(files, name)
			case k < 8:
				e, kind = link(name, "a"), 0
			case k < 10 && len(files) > 0:
				e, kind = hard(name, files[r.IntN(len(files))]), 0
			default:
				dir, base := splitPath(name)
				e, kind = file(strings.TrimPrefix(dir+"/"+whiteout+base, "/")), 0
			}
			for i := range parts[1:] {
				if k, ok := kinds[strings.Join(parts[:i+1], "/")]; ok && k == 0 {
					taken = true
				}
			}
			if taken {
				continue
			}
			kinds[name] = kind
			for i := range parts[1:] {
				if p := strings.Join(parts[:i+1], "/"); kinds[p] == 0 {
					kinds[p] = 1
				}
			}
			es = append(es, e)
		}
		for _, p := range slices.Sorted(maps.Keys(kinds)) {
			if kinds[p] > 0 && r.IntN(5) == 0 {
				es = append(es, file(p+"/"+whiteoutOpaque))
			}
		}
		if r.IntN(10) == 0 {
			es = append(es, file(whiteoutOpaque))
		}
		r.Shuffle(len(es), func(i, k int) { es[i], es[k] = es[k], es[i] })
		for i := range es {
			es[i].Mtime = mtime
			mtime++
		}
		layers = append(layers, es)
	}
	return layers
}

// grow adds layers' entries to a Growing, one a call, in an order of its own
// across the layers. Some layers come as one.
func grow(r *rand.Rand, g *Growing, layers [][]Entry) (step func() (more bool, err error)) {
	at := make([]int, len(layers))
	var open []int
	for l := range layers {
		open = append(open, l)
	}
	return func() (bool, error) {
		if len(open) == 0 {
			return false, nil
		}
		i := r.IntN(len(open))
		l := open[i]
		rest := layers[l][at[l]:]
		if len(rest) > 0 && r.IntN(8) > 0 {
			at[l]++
			return true, g.Add(l, rest[0])
		}
		open = slices.Delete(open, i, i+1)
		return true, g.AddAll(l, rest)
	}
}

// describe prints layers as a test writes them.
func describe(layers [][]Entry) string {
	var b strings.Builder
	for _, es := range layers {
		for _, e := range es {
			fmt.Fprintf(&b, "%q %o %q\n", e.Name, e.Mode, e.Link)
		}
		b.WriteString("--\n")
	}
	return b.String()
}

// TestGrowingIsMerge compares what is there in the end, and whether it is refused.
func TestGrowingIsMerge(t *testing.T) {
	refused := 0
	const runs = 8000
	for seed := range uint64(runs) {
		r := rand.New(rand.NewPCG(seed, 1))
		layers := tangle(r)
		want, wantSame, wantErr := mergedTree(layers)
		g := NewGrowing(len(layers))
		var err error
		for step, more := grow(r, g, layers), true; more && err == nil; {
			more, err = step()
			if r.IntN(3) == 0 {
				// What was asked before must not matter.
				walkTo(g, over, []string{"a", "a/b", "a/a/a", "b/c", "c"}[r.IntN(5)])
				g.ReadDir(1, 0, func(string, GrowingNode, uint64) bool { return true })
			}
		}
		if wantErr != nil {
			refused++
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("seed %d: %v, and Merge says %v\n%s", seed, err, wantErr, describe(layers))
			}
			continue
		}
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, describe(layers))
		}
		got, gotSame := grownTreeOf(t, g)
		if diff := cmp.Diff(want, got) + cmp.Diff(wantSame, gotSame); diff != "" {
			t.Fatalf("seed %d: -Merge +Growing\n%s\n%s", seed, diff, describe(layers))
		}
	}
	if refused > runs*2/3 {
		t.Errorf("%d of %d were refused: the test says little", refused, runs)
	}
}

// tidyTree makes layers that Merge accepts, with what it makes of them.
func tidyTree(t *testing.T, r *rand.Rand) (layers [][]Entry, want map[string]string) {
	t.Helper()
	for {
		layers = tidy(r)
		if want, _, err := mergedTree(layers); err == nil {
			return layers, want
		}
	}
}

// allPaths are those of the tests' alphabet, of up to three names.
func allPaths() (paths []string) {
	for i := range 5 * 5 * 5 {
		p := ""
		for _, c := range []int{i % 5, i / 5 % 5, i / 25} {
			if c == 4 {
				break
			}
			p = strings.TrimPrefix(p+"/"+string(rune('a'+c)), "/")
		}
		paths = append(paths, p)
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// without leaves out the link count, which is known at the end.
func without(s string) string {
	s, _, _ = strings.Cut(s, ", links=")
	return s
}

// TestGrowingNeverWrong asks while layers come. What is answered at once must be
// what is there in the end.
func TestGrowingNeverWrong(t *testing.T) {
	answered, waited := 0, 0
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 2))
		layers, want := tidyTree(t, r)
		g := NewGrowing(len(layers))
		ids := map[string]uint64{}
		step := grow(r, g, layers)
		for more := true; more; {
			var err error
			if more, err = step(); err != nil {
				t.Fatalf("seed %d: %v\n%s", seed, err, describe(layers))
			}
			for _, p := range allPaths()[1:] {
				n, at, err := walkTo(g, over, p)
				final, there := want[at]
				switch {
				case err == ErrCanceled:
					waited++
					if !more {
						t.Fatalf("seed %d: %q is not settled in the end\n%s", seed, at, describe(layers))
					}
					continue
				case err == ErrNotExist && there, err == nil && without(told(n.Entry, n.Layer, n.Nlink)) != without(final), err != nil && err != ErrNotExist:
					t.Fatalf("seed %d: %q is %+v, %v, and will be %q\n%s", seed, at, n, err, final, describe(layers))
				}
				answered++
				if err == nil {
					if id, ok := ids[at]; ok && id != n.ID {
						t.Fatalf("seed %d: the id of %q went from %d to %d\n%s", seed, at, id, n.ID, describe(layers))
					}
					ids[at] = n.ID
				}
			}
		}
	}
	t.Logf("%d answers, %d that would wait", answered, waited)
}

// TestGrowingWaiters has many wait while layers come.
func TestGrowingWaiters(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 3))
		layers, want := tidyTree(t, r)
		g := NewGrowing(len(layers))
		var mu sync.Mutex
		wanted := map[int]int{}
		g.Want = func(layer int) func() {
			mu.Lock()
			defer mu.Unlock()
			wanted[layer]++
			return func() { mu.Lock(); defer mu.Unlock(); wanted[layer]-- }
		}
		var wg sync.WaitGroup
		for _, p := range allPaths() {
			wg.Go(func() {
				n, at, err := walkTo(g, nil, p)
				final, there := want[at]
				if there && (err != nil || without(told(n.Entry, n.Layer, n.Nlink)) != without(final)) && err != ErrNotExist || !there && err != ErrNotExist {
					t.Errorf("seed %d: %q is %+v, %v, and will be %q", seed, at, n, err, final)
				}
			})
		}
		wg.Go(func() {
			for range 20 {
				listGrowing(t, g, 1)
			}
		})
		step := grow(r, g, layers)
		for more := true; more; {
			var err error
			if more, err = step(); err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
		for layer, n := range wanted {
			if n != 0 {
				t.Errorf("seed %d: layer %d is wanted %d times in the end", seed, layer, n)
			}
		}
	}
}
