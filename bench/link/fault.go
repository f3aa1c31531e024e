package link

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// Break says how an answer's body ends before its end.
type Break int

const (
	Whole     Break = iota // it does not
	AbortBody              // the connection is closed
	StallBody              // nothing more comes until the client goes away
)

// Fault is what becomes of one answer. Its fields combine.
type Fault struct {
	// Status, unless 0, is answered at once with Header and Body; the registry
	// is not asked.
	Status int
	Body   []byte
	// Header replaces fields of the answer; a nil value removes the field.
	Header http.Header
	// DropRange asks the registry for the whole: 200 where 206 was wanted.
	DropRange bool
	// Delay holds the request back.
	Delay time.Duration
	// Break ends the body after After bytes. An answer whose body is shorter,
	// or empty, is not broken.
	Break Break
	After int64
	// Corrupt inverts the byte at this offset of the body, counted from 1; 0
	// is none.
	Corrupt int64
}

var errBroken = errors.New("answer broken off on purpose")

type faultKey struct{}

func withFault(ctx context.Context, f *Fault) context.Context {
	return context.WithValue(ctx, faultKey{}, f)
}

func faultOf(ctx context.Context) *Fault {
	f, _ := ctx.Value(faultKey{}).(*Fault)
	return f
}

// wait spends the delay; false says that the client has gone.
func (f *Fault) wait(ctx context.Context) bool {
	return f.Delay <= 0 || sleep(ctx, time.Now().Add(f.Delay))
}

// spoil rewrites an answer's header.
func (f *Fault) spoil(h http.Header) {
	for name, values := range f.Header {
		if values == nil {
			h.Del(name)
		} else {
			h[http.CanonicalHeaderKey(name)] = slices.Clone(values)
		}
	}
}

// reply answers in the registry's place.
func (f *Fault) reply(w http.ResponseWriter) {
	if len(f.Body) > 0 {
		w.Header().Set("Content-Length", strconv.Itoa(len(f.Body)))
	}
	f.spoil(w.Header())
	w.WriteHeader(f.Status)
	if len(f.Body) > 0 {
		_, _ = w.Write(f.Body) // a client that left is no one's error here
	}
}

// split gives the part of p, which stands at offset off of the body, that may
// pass, and errBroken if that is not all of it.
func (f *Fault) split(off int64, p []byte) ([]byte, error) {
	var err error
	if f.Break != Whole && off+int64(len(p)) > f.After {
		p, err = p[:max(f.After-off, 0)], errBroken
	}
	if i := f.Corrupt - 1 - off; f.Corrupt > 0 && i >= 0 && i < int64(len(p)) {
		p = slices.Clone(p)
		p[i] = ^p[i]
	}
	return p, err
}
