package profile

import (
	"math/rand/v2"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTidy(t *testing.T) {
	for name, tt := range map[string]struct{ in, want []Use }{
		"nothing": {},
		"blocks": {
			[]Use{{Layer: 0, Off: 1, N: 4096}, {Layer: 1, Off: 10 * block, N: 1}},
			[]Use{use(0, 0, 2, 0, 0), use(1, 10, 1, 0, 0)},
		},
		"outside": {
			[]Use{{Layer: 2, N: 1}, {Layer: -1, N: 1}, use(0, 100, 1, 0, 0), use(0, -1, 1, 0, 0), use(0, 1, 0, 0, 0), use(1, 9, 500, 0, 0)},
			[]Use{use(1, 9, 2, 0, 0)},
		},
		"overlaps": {
			[]Use{use(0, 10, 5, 1, 0), use(0, 0, 30, 2, 0), use(0, 12, 2, 3, 0), use(0, 29, 2, 4, 0)},
			[]Use{use(0, 10, 5, 1, 0), use(0, 0, 10, 2, 0), use(0, 15, 15, 2, 0), use(0, 30, 1, 4, 0)},
		},
	} {
		if d := cmp.Diff(tt.want, Tidy(layers, tt.in)); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestMerge(t *testing.T) {
	old := []Use{use(0, 10, 10, 5, 0), use(1, 0, 5, 8, 1), use(0, 50, 10, 9, 2)}
	all, none := []bool{true, true, true}, []bool{false, false, false}
	for name, tt := range map[string]struct {
		recorded []Use
		fetched  []bool
		want     []Use
	}{
		"the same":       {old, all, []Use{use(0, 10, 10, 5, 0), use(1, 0, 5, 8, 0), use(0, 50, 10, 9, 0)}},
		"nothing read":   {nil, all, []Use{use(0, 10, 10, 5, 1), use(1, 0, 5, 8, 2)}},
		"it was here":    {nil, none, old},
		"nobody says":    {nil, nil, old},
		"another order":  {[]Use{use(0, 50, 10, 1, 0), use(0, 10, 10, 2, 0)}, none, []Use{use(0, 10, 10, 5, 0), use(1, 0, 5, 8, 1), use(0, 50, 10, 9, 0)}},
		"first of all":   {[]Use{use(0, 0, 1, 7, 0), use(0, 10, 10, 8, 0)}, none, []Use{use(0, 0, 1, 5, 0), use(0, 10, 10, 5, 0), use(1, 0, 5, 8, 1), use(0, 50, 10, 9, 2)}},
		"in between":     {[]Use{use(0, 10, 1, 0, 0), use(0, 30, 2, 1, 0), use(0, 50, 1, 2, 0)}, none, []Use{use(0, 10, 10, 5, 0), use(0, 30, 2, 5, 0), use(1, 0, 5, 8, 1), use(0, 50, 1, 9, 0), use(0, 51, 9, 9, 2)}},
		"around it":      {[]Use{use(0, 45, 20, 0, 0)}, all, []Use{use(0, 10, 10, 5, 1), use(1, 0, 5, 8, 2), use(0, 50, 10, 9, 0), use(0, 45, 5, 9, 0), use(0, 60, 5, 9, 0)}},
		"a part of it":   {[]Use{use(0, 12, 2, 0, 0)}, []bool{true, false, false}, []Use{use(0, 10, 2, 5, 1), use(0, 12, 2, 5, 0), use(0, 14, 6, 5, 1), use(1, 0, 5, 8, 1), use(0, 50, 10, 9, 2)}},
		"a part, unseen": {[]Use{use(0, 12, 2, 0, 0)}, none, []Use{use(0, 10, 10, 5, 0), use(1, 0, 5, 8, 1), use(0, 50, 10, 9, 2)}},
	} {
		got := Merge(&Profile{Layers: layers, Uses: old}, layers, tt.recorded, tt.fetched)
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	if got := Merge(nil, layers, old[:1], nil); cmp.Diff(old[:1], got) != "" {
		t.Errorf("without an old one: %v", got)
	}
}

// TestMergeDrops has a range go that is never read, and one stay that is read now
// and then.
func TestMergeDrops(t *testing.T) {
	p := &Profile{Manifest: manifest, Layers: layers, Uses: []Use{use(0, 0, 1, 0, 0), use(0, 10, 1, 0, 0), use(0, 20, 1, 0, 0)}}
	for i := range 6 {
		recorded := []Use{use(0, 0, 1, 0, 0)}
		if i%MaxMissed == MaxMissed-1 {
			recorded = append(recorded, use(0, 20, 1, 0, 0))
		}
		fetched := []bool{true, true, true}
		p.Uses = Merge(p, layers, recorded, fetched[:len(p.Uses)])
		if want := map[bool]int{true: 3, false: 2}[i < MaxMissed-1]; len(p.Uses) != want {
			t.Errorf("after %d starts: %v", i+1, p.Uses)
		}
	}
	if p.Uses[1].Off != 20*block {
		t.Errorf("left: %v", p.Uses)
	}
}

// TestMergeModel compares with a set of blocks.
func TestMergeModel(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	type at struct {
		layer int
		block int64
	}
	some := func() (uses []Use) {
		for range rng.IntN(30) {
			l := rng.IntN(2)
			uses = append(uses, use(l, rng.Int64N(layers[l].Size/block), 1+rng.Int64N(12), rng.IntN(9), 0))
		}
		return Tidy(layers, uses)
	}
	blocks := func(uses []Use) map[at]int {
		m := map[at]int{}
		for _, u := range uses {
			for b := u.Off / block; b < (u.Off+u.N)/block; b++ {
				if _, twice := m[at{u.Layer, b}]; twice {
					t.Fatalf("seed %d: block %d of layer %d twice in %v", seed, b, u.Layer, uses)
				}
				m[at{u.Layer, b}] = u.Missed
			}
		}
		return m
	}
	for range 500 {
		p := &Profile{Manifest: manifest, Layers: layers, Uses: some()}
		fetched := make([]bool, len(p.Uses))
		was := map[at]bool{}
		for i := range p.Uses {
			p.Uses[i].Missed = rng.IntN(MaxMissed)
			if fetched[i] = rng.IntN(2) == 0; fetched[i] {
				for b := range blocks(p.Uses[i : i+1]) {
					was[b] = true
				}
			}
		}
		recorded := some()
		want := blocks(p.Uses)
		for b := range want {
			if was[b] {
				want[b]++
			}
		}
		for b := range blocks(recorded) {
			want[b] = 0
		}
		for b, n := range want {
			if n == MaxMissed {
				delete(want, b)
			}
		}
		p.Uses = Merge(p, layers, recorded, fetched)
		if d := cmp.Diff(want, blocks(p.Uses)); d != "" {
			t.Fatalf("seed %d: %s", seed, d)
		}
		if _, err := p.Encode(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}
