package profile

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

var (
	manifest = digest.FromString("manifest").String()
	layers   = []Layer{
		{Digest: digest.FromString("low").String(), Size: 100 * block},
		{Digest: digest.FromString("high").String(), Size: 10*block + 1},
	}
)

// use is a range in blocks.
func use(layer int, from, n int64, after int, missed int) Use {
	return Use{Layer: layer, Off: from * block, N: n * block, After: time.Duration(after) * time.Millisecond, Missed: missed}
}

func sample() *Profile {
	return &Profile{
		Manifest: manifest, Name: "web-1", Created: time.Date(2024, 2, 29, 1, 2, 3, 0, time.UTC), Layers: layers,
		Uses: []Use{use(0, 40, 2, 0, 0), use(1, 10, 1, 7, 2), use(0, 0, 40, 7, 0), use(0, 99, 1, 9, 1)},
	}
}

func TestEncodeDecode(t *testing.T) {
	for name, p := range map[string]*Profile{
		"sample": sample(),
		"empty":  {Manifest: manifest, Layers: []Layer{}, Uses: []Use{}},
	} {
		b, err := p.Encode()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := Decode(b)
		if err != nil || cmp.Diff(p, got) != "" {
			t.Errorf("%s: %v\n%s", name, err, cmp.Diff(p, got))
		}
		again, _ := p.Encode()
		if !bytes.Equal(b, again) || !Is(b) {
			t.Errorf("%s: encoded twice it differs", name)
		}
	}
	p := sample()
	p.Created = p.Created.Add(time.Nanosecond)
	p.Uses[1].After += 999 * time.Microsecond
	b, _ := p.Encode()
	if got, err := Decode(b); err != nil || cmp.Diff(sample(), got) != "" {
		t.Errorf("times are not rounded down: %v %+v", err, got)
	}
}

// TestEncodeSize holds a start of 3000 small files against what an annotation of a
// manifest can carry.
func TestEncodeSize(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	p := &Profile{Manifest: manifest, Layers: []Layer{{Digest: layers[0].Digest, Size: 1 << 30}, {Digest: layers[1].Digest, Size: 1 << 30}}}
	at, ms := [2]int64{}, 0
	for range 3000 {
		l := rng.IntN(2)
		at[l] += rng.Int64N(60)
		ms += rng.IntN(5)
		n := 1 + rng.Int64N(20)
		p.Uses = append(p.Uses, use(l, at[l], n, ms, 0))
		at[l] += n
	}
	b, err := p.Encode()
	if err != nil || len(b) > 12<<10 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

// packed makes a profile of a document that Encode would not write.
func packed(t testing.TB, d any) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if text, ok := d.(string); ok {
		z.Write([]byte(text))
	} else if err := json.NewEncoder(z).Encode(d); err != nil {
		t.Fatal(err)
	}
	z.Close()
	return b.Bytes()
}

func plain() document {
	return document{Version: 1, Manifest: manifest, Layers: []docLayer{docLayer(layers[0]), docLayer(layers[1])},
		Layer: column{0}, Off: column{0}, N: column{1}, After: column{0}, Missed: column{0}}
}

func TestDecodeHostile(t *testing.T) {
	if _, err := Decode(packed(t, plain())); err != nil {
		t.Fatalf("the plain one: %v", err)
	}
	for name, change := range map[string]func(*document){
		"version":        func(d *document) { d.Version = 2 },
		"no version":     func(d *document) { d.Version = 0 },
		"manifest":       func(d *document) { d.Manifest = "sha256:00" },
		"name":           func(d *document) { d.Name = "../x" },
		"default":        func(d *document) { d.Name = Default },
		"long name":      func(d *document) { d.Name = strings.Repeat("a", maxName+1) },
		"layer digest":   func(d *document) { d.Layers[0].Digest = "" },
		"layer size":     func(d *document) { d.Layers[0].Size = -1 },
		"layer":          func(d *document) { d.Layer[0] = 2 },
		"layer below":    func(d *document) { d.Layer[0] = -1 },
		"before it":      func(d *document) { d.Off[0] = -1 },
		"past it":        func(d *document) { d.Off[0] = 100 },
		"across its end": func(d *document) { d.Off[0], d.N[0] = 99, 2 },
		"nothing":        func(d *document) { d.N[0] = 0 },
		"less":           func(d *document) { d.N[0] = -1 },
		"overflow":       func(d *document) { d.Off[0], d.N[0] = 1<<62, 1<<62 },
		"long ago":       func(d *document) { d.After[0] = -1 },
		"late":           func(d *document) { d.After[0] = 1 << 39 },
		"missed":         func(d *document) { d.Missed[0] = MaxMissed },
		"missed below":   func(d *document) { d.Missed[0] = -1 },
		"a short column": func(d *document) { d.N = nil },
		"a long column":  func(d *document) { d.N = column{1, 1} },
		"twice the bytes": func(d *document) {
			d.Layer, d.Off, d.N, d.After, d.Missed = column{0, 0}, column{0, -1}, column{2, 2}, column{0, 0}, column{0, 0}
		},
		"too many layers": func(d *document) { d.Layers = make([]docLayer, maxLayers+1) },
		"too many ranges": func(d *document) { d.Layer = make(column, MaxUses+1) },
	} {
		d := plain()
		change(&d)
		if p, err := Decode(packed(t, d)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v %+v", name, err, p)
		}
	}
	whole := packed(t, plain())
	for name, b := range map[string][]byte{
		"nothing": nil, "text": []byte("usr/bin/sh\n"), "no JSON": packed(t, "[1,2"), "an array": packed(t, "[]"), "null": packed(t, "null"),
		"half": whole[:len(whole)/2], "another number": packed(t, `{"varve_profile":1,"layer":[1.5]}`), "too long": make([]byte, MaxBytes+1),
	} {
		if p, err := Decode(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v %+v", name, err, p)
		}
	}
	for i := range whole {
		b := bytes.Clone(whole)
		b[i] ^= 0x55
		if p, err := Decode(b); err == nil && cmp.Diff(p, must(Decode(whole))) != "" {
			t.Errorf("byte %d changed: another profile", i)
		}
	}
}

func must(p *Profile, err error) *Profile {
	if err != nil {
		panic(err)
	}
	return p
}

// TestDecodeBomb proves that what decompresses to very much takes no memory of
// that order.
func TestDecodeBomb(t *testing.T) {
	zeroes := strings.Repeat("0,", 1<<20)
	bomb := func(repeat int) []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		fmt.Fprint(z, `{"varve_profile":1,"layer":[`)
		for range repeat {
			z.Write([]byte(zeroes))
		}
		fmt.Fprint(z, `0]}`)
		z.Close()
		return b.Bytes()
	}
	for name, b := range map[string][]byte{"a bomb": bomb(64), "many ranges": bomb(4)} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := Decode(b)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, ErrMalformed) || n > 8*maxDecoded {
			t.Errorf("%s: %d bytes allocated, %v", name, n, err)
		}
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, change := range map[string]func(*Profile){
		"half a block": func(p *Profile) { p.Uses[0].N++ },
		"overlap":      func(p *Profile) { p.Uses[1] = p.Uses[0] },
		"no manifest":  func(p *Profile) { p.Manifest = "" },
		"far past":     func(p *Profile) { p.Created = time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		p := sample()
		change(p)
		if _, err := p.Encode(); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheck(t *testing.T) {
	other := digest.FromString("other").String()
	for name, tt := range map[string]struct {
		manifest string
		layers   []Layer
		want     error
	}{
		"its own":          {manifest, layers, nil},
		"sizes not known":  {manifest, []Layer{{Digest: layers[0].Digest}, {Digest: layers[1].Digest}}, nil},
		"another manifest": {other, layers, ErrForeign},
		"fewer layers":     {manifest, layers[:1], ErrForeign},
		"another layer":    {manifest, []Layer{layers[0], {Digest: other, Size: layers[1].Size}}, ErrForeign},
		"another size":     {manifest, []Layer{layers[0], {Digest: layers[1].Digest, Size: 11 * block}}, ErrOutdated},
	} {
		if err := sample().Check(tt.manifest, tt.layers); !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

func TestParseName(t *testing.T) {
	for s, want := range map[string]string{"": "", "default": "", "a": "a", "0.x_y-Z": "0.x_y-Z"} {
		if got, err := ParseName(s); err != nil || got != want {
			t.Errorf("%q: %q, %v", s, got, err)
		}
	}
	for _, s := range []string{".", "..", "a/b", "-x", "ä", "a b", "a\n", strings.Repeat("x", maxName+1)} {
		if got, err := ParseName(s); err == nil {
			t.Errorf("%q: %q", s, got)
		}
	}
	if Title("") != "default" || Title("web") != "web" {
		t.Error("titles")
	}
}

func FuzzDecode(f *testing.F) {
	b, _ := sample().Encode()
	f.Add(b)
	f.Add(packed(f, plain()))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		again, err := p.Encode()
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		got, err := Decode(again)
		if err != nil {
			t.Fatal(err)
		}
		p.Created = p.Created.UTC().Truncate(time.Second)
		if d := cmp.Diff(p, got); d != "" {
			t.Fatal(d)
		}
	})
}
