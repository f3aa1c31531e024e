package profile

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
)

// A profile is kept and pushed as JSON in gzip, so that anybody can look into
// one. The ranges stand in columns, in blocks and relative to what comes before,
// which makes a start of some thousand files a few kilobytes.
const version = 1

// maxDecoded is more than anything that Encode writes takes.
const maxDecoded = 16 << 20

type document struct {
	Version  int       `json:"varve_profile"`
	Manifest string    `json:"manifest"`
	Name     string    `json:"name,omitempty"`
	Created  time.Time `json:"created"`
	Layers   docLayers `json:"layers"`

	Layer  column `json:"layer"`  // place among the layers
	Off    column `json:"off"`    // blocks, from the end of the range before it in the same layer
	N      column `json:"n"`      // blocks
	After  column `json:"after"`  // milliseconds, from the range before
	Missed column `json:"missed"` // see Use
}

type docLayer struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// docLayers are counted before they are read, as a column is.
type docLayers []docLayer

func (l *docLayers) UnmarshalJSON(b []byte) error {
	// No layer has more than one comma of its own.
	if n := bytes.Count(b, []byte{','}) + 1; n > 2*maxLayers {
		return fmt.Errorf("more than %d layers", maxLayers)
	}
	return json.Unmarshal(b, (*[]docLayer)(l))
}

// column is a field of all ranges. It is counted before it is read, so that what
// a hostile one takes is bounded by the number of ranges.
type column []int64

func (c *column) UnmarshalJSON(b []byte) error {
	if n := bytes.Count(b, []byte{','}) + 1; n > MaxUses {
		return fmt.Errorf("%d ranges, the limit is %d", n, MaxUses)
	}
	return json.Unmarshal(b, (*[]int64)(c))
}

// Encode writes a profile as [Decode] reads it. Times are rounded to
// milliseconds. The same profile gives the same bytes.
func (p *Profile) Encode() ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	d := document{Version: version, Manifest: p.Manifest, Name: p.Name, Created: p.Created.UTC().Truncate(time.Second), Layers: make([]docLayer, len(p.Layers))}
	for i, l := range p.Layers {
		d.Layers[i] = docLayer(l)
	}
	ends := make([]int64, len(p.Layers))
	for _, c := range []*column{&d.Layer, &d.Off, &d.N, &d.After, &d.Missed} {
		*c = make(column, len(p.Uses))
	}
	var last int64
	for i, u := range p.Uses {
		after := u.After.Milliseconds()
		d.Layer[i], d.Off[i], d.N[i] = int64(u.Layer), u.Off/block-ends[u.Layer], u.N/block
		d.After[i], d.Missed[i] = after-last, int64(u.Missed)
		ends[u.Layer], last = (u.Off+u.N)/block, after
	}
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(z).Encode(d); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	if b.Len() > MaxBytes {
		return nil, fmt.Errorf("%w: %d bytes, the limit is %d", ErrMalformed, b.Len(), MaxBytes)
	}
	return b.Bytes(), nil
}

// Is reports whether bytes are meant to be a profile in this form.
func Is(b []byte) bool { return bytes.HasPrefix(b, []byte{0x1f, 0x8b}) }

// Decode reads a profile, whoever wrote it: what it gives is in order, but may be
// of another image. Errors wrap ErrMalformed.
func Decode(b []byte) (*Profile, error) {
	p, err := decode(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return p, p.check()
}

func decode(b []byte) (*Profile, error) {
	if len(b) > MaxBytes {
		return nil, fmt.Errorf("%d bytes, the limit is %d", len(b), MaxBytes)
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	// A little at a time: what is short and says that it is long takes nothing.
	text, err := io.ReadAll(io.LimitReader(z, maxDecoded+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxDecoded {
		return nil, fmt.Errorf("more than %d bytes, decompressed", maxDecoded)
	}
	var d document
	if err := json.Unmarshal(text, &d); err != nil {
		return nil, err
	}
	if d.Version != version {
		return nil, fmt.Errorf("version %d, known is %d", d.Version, version)
	}
	n := len(d.Layer)
	if len(d.Off) != n || len(d.N) != n || len(d.After) != n || len(d.Missed) != n {
		return nil, fmt.Errorf("its columns have %d, %d, %d, %d and %d ranges", n, len(d.Off), len(d.N), len(d.After), len(d.Missed))
	}
	if len(d.Layers) > maxLayers {
		return nil, fmt.Errorf("%d layers, the limit is %d", len(d.Layers), maxLayers)
	}
	p := &Profile{Manifest: d.Manifest, Name: d.Name, Created: d.Created, Layers: make([]Layer, len(d.Layers)), Uses: make([]Use, n)}
	for i, l := range d.Layers {
		p.Layers[i] = Layer(l)
	}
	ends := make([]int64, len(p.Layers))
	var last int64
	for i := range p.Uses {
		l := d.Layer[i]
		if l < 0 || l >= int64(len(ends)) {
			return nil, fmt.Errorf("range %d lies in layer %d of %d", i, l, len(ends))
		}
		// Numbers so large that sums of them would not fit are in no profile.
		const most = 1 << 40
		for _, v := range []int64{d.Off[i], d.N[i], d.After[i]} {
			if v < -most || v > most {
				return nil, fmt.Errorf("range %d: %d", i, v)
			}
		}
		from := ends[l] + d.Off[i]
		ends[l] = from + d.N[i]
		if last += d.After[i]; ends[l] > most || from < 0 || last < 0 || last > most || d.Missed[i] < 0 || d.Missed[i] >= MaxMissed {
			return nil, fmt.Errorf("range %d: blocks %d to %d after %d ms, missed %d times", i, from, ends[l], last, d.Missed[i])
		}
		p.Uses[i] = Use{Layer: int(l), Off: from * block, N: d.N[i] * block, After: time.Duration(last) * time.Millisecond, Missed: int(d.Missed[i])}
	}
	return p, nil
}

// check says what is wrong with a profile in itself.
func (p *Profile) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...)
	}
	if err := digest.Digest(p.Manifest).Validate(); err != nil {
		return bad("manifest %.80q", p.Manifest)
	}
	if name, err := ParseName(p.Name); err != nil || name != p.Name {
		return bad("name %.80q", p.Name)
	}
	if y := p.Created.Year(); y < 0 || y > 9999 {
		return bad("created in the year %d", y)
	}
	if len(p.Layers) > maxLayers || len(p.Uses) > MaxUses {
		return bad("%d layers, the limit is %d; %d ranges, the limit is %d", len(p.Layers), maxLayers, len(p.Uses), MaxUses)
	}
	for i, l := range p.Layers {
		if err := digest.Digest(l.Digest).Validate(); err != nil || l.Size < 0 || l.Size > 1<<52 {
			return bad("layer %d: %.80q of %d bytes", i, l.Digest, l.Size)
		}
	}
	for i, u := range p.Uses {
		if u.Layer < 0 || u.Layer >= len(p.Layers) {
			return bad("range %d lies in layer %d of %d", i, u.Layer, len(p.Layers))
		}
		size := (p.Layers[u.Layer].Size + block - 1) / block * block
		if u.Off < 0 || u.N <= 0 || u.Off%block != 0 || u.N%block != 0 || u.Off > size-u.N {
			return bad("range %d: %d bytes at %d of layer %d, which has %d", i, u.N, u.Off, u.Layer, size)
		}
		if u.After < 0 || u.After > maxAfter || u.Missed < 0 || u.Missed >= MaxMissed {
			return bad("range %d: after %v, missed %d times", i, u.After, u.Missed)
		}
	}
	if i := overlap(p.Uses); i >= 0 {
		return bad("range %d: its bytes are in another as well", i)
	}
	return nil
}
