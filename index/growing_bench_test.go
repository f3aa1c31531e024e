package index

import (
	"fmt"
	"runtime"
	"testing"
)

// benchLayer is a layer as large images have them: listed directories of twenty
// files.
func benchLayer(layer, n int) (es []Entry) {
	for i := range n {
		d := fmt.Sprintf("usr/lib/python3/site-packages/package-%d/module-%d", i/400, i/20)
		if i%400 == 0 {
			d, _ := splitPath(d)
			es = append(es, dir(d))
		}
		if i%20 == 0 {
			es = append(es, dir(d))
		}
		es = append(es, file(fmt.Sprintf("%s/source-%d-%d.py", d, layer, i)))
	}
	return append([]Entry{dir("usr"), dir("usr/lib"), dir("usr/lib/python3"), dir("usr/lib/python3/site-packages")}, es...)
}

// BenchmarkGrowingAdd says what an entry costs, its own memory and names included.
func BenchmarkGrowingAdd(b *testing.B) {
	b.ReportAllocs()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	g := NewGrowing(1)
	const n = 100_000
	done := 0
	for b.Loop() {
		g = NewGrowing(1)
		es := benchLayer(0, n)
		done = len(es)
		for _, e := range es {
			if err := g.Add(0, e); err != nil {
				b.Fatal(err)
			}
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(done), "B/entry")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*done), "ns/entry")
	runtime.KeepAlive(g)
}

// BenchmarkGrowingLookup looks a name of the lowest layer up, below twenty others.
func BenchmarkGrowingLookup(b *testing.B) {
	const layers = 20
	for _, growing := range []bool{false, true} {
		b.Run(fmt.Sprintf("growing=%v", growing), func(b *testing.B) {
			g := NewGrowing(layers + 1)
			for l := range layers {
				if err := g.AddAll(l, benchLayer(l, 2000)); err != nil {
					b.Fatal(err)
				}
			}
			name := "usr/lib/python3/site-packages/package-0/module-0"
			g.AddAll(layers, []Entry{dir("usr"), dir("usr/lib")})
			d, _, err := walkTo(g, over, name)
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if growing {
					g.tree.shape++ // as every directory that passes may do
				}
				if _, err := g.Lookup(over, d.ID, "source-0-3.py"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkGrowingReadDir lists 40 000 names of twenty layers.
func BenchmarkGrowingReadDir(b *testing.B) {
	const layers = 20
	g := NewGrowing(layers)
	for l := range layers {
		var es []Entry
		for i := range 2000 {
			es = append(es, file(fmt.Sprint(l*2000+i)))
		}
		if err := g.AddAll(l, es); err != nil {
			b.Fatal(err)
		}
	}
	n := 0
	for b.Loop() {
		n = 0
		g.ReadDir(1, 0, func(string, GrowingNode, uint64) bool { n++; return true })
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/name")
}
