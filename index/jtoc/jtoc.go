// Package jtoc reads the JSON table of contents that eStargz and both dialects
// of zstd:chunked share.
//
// The document is streamed: one entry is held at a time, however many there are.
package jtoc

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/go-json-experiment/json/jsontext"
	digest "github.com/opencontainers/go-digest"

	"github.com/varvefs/varve/index"
)

// Limits of a table of contents beside those of [index].
const (
	maxEntryJSON = 2 << 20 // bytes of JSON for one entry, its extended attributes included
	maxChunks    = 2 << 20 // chunks of all files of a layer
)

// Options says what the blob allows and what its format hides.
type Options struct {
	// DataEnd is where the blob's file contents end, in bytes: no chunk begins
	// at or after it.
	DataEnd int64
	// Skip reports whether an entry is the format's own and no file of the
	// layer. It is given the clean name and where in the blob the entry's
	// contents begin. Nil skips nothing.
	Skip func(name string, off int64) bool
	// Proved says that the caller checks the document's bytes itself; then no
	// digest need be wanted.
	Proved bool
}

// Read adds the entries of the table of contents in r to b. It reads r to its
// end and only then knows whether the bytes are those whose sha256 is want, so
// on any error the builder must be dropped. Errors wrap [index.ErrMalformed]
// unless r itself failed.
func Read(r io.Reader, want digest.Digest, b *index.Builder, o Options) error {
	if want != "" || !o.Proved {
		if _, err := parseDigest(string(want)); err != nil {
			return fmt.Errorf("TOC: wanted %w", err)
		}
	}
	s := &source{r: r, sum: sha256.New()}
	// What it lets pass here, encoding/json judges in the entry it is in.
	dec := jsontext.NewDecoder(s, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	s.dec = dec
	c := converter{b: b, o: o}
	err := document(dec, &c)
	if s.err != nil { // what the decoder makes of a failed read says less
		return fmt.Errorf("read TOC: %w", s.err)
	}
	if err != nil {
		return err
	}
	if err := s.drain(); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, s.sum); want != "" && got != want {
		return fmt.Errorf("%w: TOC has digest %s, want %s", index.ErrMalformed, got, want)
	}
	return nil
}

// document walks {"version": 1, "entries": [...], ...}.
func document(dec *jsontext.Decoder, c *converter) error {
	if err := expect(dec, jsontext.KindBeginObject); err != nil {
		return err
	}
	version, seen := int64(0), false
	for dec.PeekKind() != jsontext.KindEndObject {
		key, err := dec.ReadToken()
		if err != nil {
			return malformed("TOC", err)
		}
		switch key := key.String(); key {
		case "version":
			value, err := dec.ReadValue()
			if err == nil {
				err = json.Unmarshal(value, &version)
			}
			if err != nil {
				return malformed("TOC version", err)
			}
			if version != 1 {
				return fmt.Errorf("%w: TOC of version %d, known is 1", index.ErrMalformed, version)
			}
		case "entries":
			if seen {
				return fmt.Errorf("%w: TOC lists its entries twice", index.ErrMalformed)
			}
			seen = true
			if err := entries(dec, c); err != nil {
				return err
			}
		default:
			if err := dec.SkipValue(); err != nil {
				return malformed(fmt.Sprintf("TOC field %.80q", key), err)
			}
		}
	}
	if err := expect(dec, jsontext.KindEndObject); err != nil {
		return err
	}
	if version != 1 {
		return fmt.Errorf("%w: TOC has no version", index.ErrMalformed)
	}
	if len(bytes.TrimSpace(dec.UnreadBuffer())) > 0 {
		return fmt.Errorf("%w: TOC has data after its end", index.ErrMalformed)
	}
	return nil
}

func entries(dec *jsontext.Decoder, c *converter) error {
	tok, err := dec.ReadToken()
	if err != nil {
		return malformed("TOC entries", err)
	}
	if tok.Kind() == jsontext.KindNull { // Go writes an empty list so
		return nil
	}
	if tok.Kind() != jsontext.KindBeginArray {
		return fmt.Errorf("%w: TOC entries begin with %v", index.ErrMalformed, tok.Kind())
	}
	var e entry
	for n := 0; dec.PeekKind() != jsontext.KindEndArray; n++ {
		e.reset()
		value, err := dec.ReadValue()
		if err == nil {
			err = e.UnmarshalJSON(value)
		}
		if err != nil {
			return malformed(fmt.Sprintf("TOC entry %d (after %.80q)", n, c.name), err)
		}
		if err := c.take(&e); err != nil {
			return err
		}
	}
	if err := expect(dec, jsontext.KindEndArray); err != nil {
		return err
	}
	return c.finish()
}

func expect(dec *jsontext.Decoder, want jsontext.Kind) error {
	tok, err := dec.ReadToken()
	if err != nil {
		return malformed("TOC", err)
	}
	if tok.Kind() != want {
		return fmt.Errorf("%w: TOC has %v, want %v", index.ErrMalformed, tok.Kind(), want)
	}
	return nil
}

// malformed wraps what the JSON decoder says of foreign bytes.
func malformed(what string, err error) error {
	if errors.Is(err, index.ErrMalformed) {
		return err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %s is truncated", index.ErrMalformed, what)
	}
	return fmt.Errorf("%w: %s: %w", index.ErrMalformed, what, err)
}

// source hashes what the decoder reads and bounds how much that is: all of the
// document, and how far the decoder has to look ahead for the end of one value.
type source struct {
	r    io.Reader
	sum  hash.Hash
	dec  *jsontext.Decoder
	read int64
	err  error // of r, other than its end
}

func (s *source) Read(p []byte) (int, error) {
	if s.read-s.dec.InputOffset() > maxEntryJSON {
		return 0, fmt.Errorf("%w: longer than %d bytes", index.ErrMalformed, maxEntryJSON)
	}
	n, err := s.next(p)
	return n, err
}

func (s *source) next(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.sum.Write(p[:n])
	s.read += int64(n)
	if s.read > index.MaxTOCSize {
		return 0, fmt.Errorf("%w: TOC is larger than %d bytes", index.ErrMalformed, int64(index.MaxTOCSize))
	}
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// drain reads what the decoder left, which may only be white space.
func (s *source) drain() error {
	buf := make([]byte, 4096)
	for {
		n, err := s.next(buf)
		if len(bytes.TrimSpace(buf[:n])) > 0 {
			return fmt.Errorf("%w: TOC has data after its end", index.ErrMalformed)
		}
		if err == io.EOF {
			return nil
		}
		if s.err != nil {
			return fmt.Errorf("read TOC: %w", err)
		}
		if err != nil {
			return err
		}
	}
}
