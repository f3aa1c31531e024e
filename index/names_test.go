package index

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// A directory is a slice while it is small and a map when it is large, until it is
// written. What it has must not depend on that.
func TestNamesAreAMap(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	k, want := &names{}, map[string]*node{}
	for i := range 40_000 {
		n := &node{name: fmt.Sprint(r.IntN(2 * manyNames)), layer: int32(i)}
		switch op := r.IntN(8); {
		case op == 0:
			k.remove(n.name)
			delete(want, n.name)
		case op == 1 && i%500 == 0:
			some := func(n *node) bool { return n.layer%16 != 0 }
			k.keep(some)
			for name, n := range want {
				if !some(n) {
					delete(want, name)
				}
			}
		case op == 2 && i%700 == 0:
			k.sorted()
		case i > 20_000 && op < 5: // fewer from here on
			k.remove(n.name)
			delete(want, n.name)
		default:
			k.put(n)
			want[n.name] = n
		}
		if got := k.get(n.name); got != want[n.name] {
			t.Fatalf("step %d: %q is %v, want %v", i, n.name, got, want[n.name])
		}
	}
	got := map[string]*node{}
	for n := range k.all() {
		got[n.name] = n
	}
	last := ""
	for _, n := range k.sorted() {
		if n.name <= last {
			t.Fatalf("%q follows %q", n.name, last)
		}
		if last = n.name; want[n.name] != n || got[n.name] != n {
			t.Fatalf("%q is another", n.name)
		}
	}
	if len(k.sorted()) != len(want) || len(got) != len(want) {
		t.Fatalf("%d names, %d in order, want %d", len(got), len(k.sorted()), len(want))
	}
}

// A tree keeps nothing of the entries that it was made from: their memory is used
// again for the next layer's.
func TestTreeKeepsNoEntries(t *testing.T) {
	layer := func(doc *[]byte) []Entry {
		es := []Entry{dir("d"), file("d/b"), link("d/s", "b"), hard("d/h", "d/b"), hard("early", "d/late"), file("d/late"),
			{Name: "x", Mode: 0o100644, Xattrs: []Xattr{{"user.a", []byte("value")}}}, file("long/" + strings.Repeat("n", MaxName))}
		var buf bytes.Buffer
		if err := WriteTOC(&buf, es); err != nil {
			t.Fatal(err)
		}
		*doc = buf.Bytes()
		read, err := ReadTOC(*doc)
		if err != nil {
			t.Fatal(err)
		}
		return read
	}
	write := func(scribble bool) []byte {
		tree := NewTree()
		for range 2 {
			var doc []byte
			entries := layer(&doc)
			if err := tree.Add(entries); err != nil {
				t.Fatal(err)
			}
			if scribble {
				clear(entries)
				for i := range doc {
					doc[i] = '?'
				}
			}
		}
		var buf bytes.Buffer
		for range 2 { // it may be written more than once
			buf.Reset()
			if err := tree.WriteTo(&buf, make([]Device, 2)); err != nil {
				t.Fatal(err)
			}
		}
		return buf.Bytes()
	}
	if !bytes.Equal(write(true), write(false)) {
		t.Error("the index changes with the memory of the entries")
	}
}
