package image

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Referrer is a manifest whose subject is another: an index of its layers say,
// or a signature. It is what a registry says of it, none of it verified.
type Referrer struct {
	Digest       digest.Digest     // of the manifest, SHA-256
	Size         int64             // of the manifest, in bytes, 0 to MaxManifest
	MediaType    string            // of the manifest
	ArtifactType string            // "" where an old list does not say
	Annotations  map[string]string // of the manifest
}

// Referrers lists what refers to a manifest in n's repository, of the given
// artifact types, or all if none is given; what has no type is then in the list
// too. Nothing there is no error, nor is a name that is in no registry.
//
// The hosts are asked in the order in which they are asked what a tag points
// at, until one answers. One that has the referrers API is believed; of
// one that has not, the tag is read which takes its place. Which of both a host
// has is found out by asking for both at once, and remembered. The requests
// share connections and tokens with those for the image.
//
// A list that does not end is cut, with a line in the log.
func (r *Registries) Referrers(ctx context.Context, n Name, o Options, subject digest.Digest, types ...string) ([]Referrer, error) {
	if n.IsZero() {
		return nil, malformed("list referrers: the name is empty")
	}
	if err := checkSHA256(subject); err != nil {
		return nil, about(n, err)
	}
	if n.kind != remoteKind {
		return nil, nil
	}
	g, err := r.remote(n, o)
	if err != nil {
		return nil, err
	}
	l := &lister{registry: g, known: &r.listing, subject: subject, types: types}
	return l.list(ctx)
}

// FetchManifest reads one manifest of n's repository by its digest, at most
// limit bytes of it. mediaType is what the registry is asked for, "" for any
// kind of manifest.
func (r *Registries) FetchManifest(ctx context.Context, n Name, o Options, d digest.Digest, mediaType string, limit int64) ([]byte, error) {
	if mediaType == "" {
		mediaType = strings.Join(manifestTypes, ", ")
	}
	return r.fetch(ctx, n, o, "manifests", d, mediaType, limit)
}

// FetchBlob reads a small blob of n's repository into memory, at most limit
// bytes of it. It must come within two minutes: a large one is better read by
// range, from where [Source] says.
func (r *Registries) FetchBlob(ctx context.Context, n Name, o Options, d digest.Digest, limit int64) ([]byte, error) {
	return r.fetch(ctx, n, o, "blobs", d, "", limit)
}

// fetch reads a document from the first host that has it with the right digest.
func (r *Registries) fetch(ctx context.Context, n Name, o Options, kind string, d digest.Digest, accept string, limit int64) ([]byte, error) {
	if err := checkRemote(n); err != nil {
		return nil, err
	}
	if err := checkSHA256(d); err != nil {
		return nil, about(n, err)
	}
	g, err := r.remote(n, o)
	if err != nil {
		return nil, err
	}
	raw, _, err := g.get(ctx, kind, d.String(), d, accept, limit)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, renamed("read "+strings.TrimSuffix(kind, "s")+" "+d.String(), err)
	}
	return raw, nil
}

func checkRemote(n Name) error {
	if n.kind != remoteKind {
		return malformed("%q is in no registry", n.Familiar())
	}
	return nil
}

// checkSHA256 checks a digest and refuses every other algorithm.
func checkSHA256(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return failf(ErrMalformed, err, "digest %q: %s", clip(string(d)), err)
	}
	return checkAlgorithm(d)
}

// fallbackTag names the index that stands in for the referrers API where there
// is none (distribution-spec, "Referrers Tag Schema").
func fallbackTag(subject digest.Digest) string {
	return subject.Algorithm().String() + "-" + subject.Encoded()
}

// lister asks the hosts of one name for what refers to subject.
type lister struct {
	*registry
	known   *listings
	subject digest.Digest
	types   []string
}

func (l *lister) list(ctx context.Context) ([]Referrer, error) {
	var last error
	asked := false
	for i, s := range l.sessions {
		if !s.host.pull || !s.host.resolve {
			continue
		}
		asked = true
		list, there, err := l.host(ctx, s)
		switch {
		case err == nil && there:
			return list, nil
		case err == nil:
			// A mirror that has neither does not speak for the registry.
			last = nil
		case ctx.Err() != nil:
			return nil, err
		default:
			last = err
			if i < len(l.sessions)-1 {
				l.log.Warn("mirror failed, the next is asked", "ref", l.name.Familiar(), "host", s.host.addr, "err", err)
			}
		}
	}
	if !asked {
		return nil, failf(ErrUnreachable, nil, "list referrers of %s: hosts.toml leaves no host that may be asked", l.name.Familiar())
	}
	return nil, last
}

// found is one answer: there is false if what was asked is not there at all.
type found struct {
	list  []Referrer
	there bool
	err   error
}

// host asks one host by the API, the tag, or both side by side: a mount waits.
func (l *lister) host(ctx context.Context, s *session) ([]Referrer, bool, error) {
	ln := l.line(s)
	how := l.known.of(s.host)
	if how == byTag {
		t := l.tag(ctx, ln)
		return t.list, t.there, t.err
	}
	var tag func() found
	if how == byAPI {
		tag = func() found { return l.tag(ctx, ln) }
	} else {
		tctx, cancel := context.WithCancel(ctx)
		answer := make(chan found, 1)
		go func() { answer <- l.tag(tctx, ln) }()
		waited := false
		tag = func() found { waited = true; return <-answer }
		defer func() {
			cancel()
			if !waited {
				<-answer
			}
		}()
	}
	a := l.api(ctx, ln)
	if a.there || a.err != nil {
		return a.list, a.there, a.err
	}
	t := tag()
	return t.list, t.there, t.err
}

func (l *lister) line(s *session) *line {
	return &line{session: s, wait: l.wait, repo: l.name.repo, doing: "list referrers of " + l.name.FamiliarRepository() + "@" + l.subject.String()}
}

// api reads the pages of the referrers API and notes whether there is one.
func (l *lister) api(ctx context.Context, ln *line) found {
	u := ln.at("referrers/" + l.subject.String())
	// The specification has one type to filter by. That a registry says that it
	// did is not relied on.
	if len(l.types) == 1 {
		u.RawQuery = url.Values{"artifactType": l.types}.Encode()
	}
	c := collector{types: l.types}
	left := int64(maxListBytes)
	seen := map[string]bool{}
	for page := 0; ; page++ {
		seen[u.String()] = true
		a, err := ln.again(ctx, func() (*reply, error) {
			return ln.once(ctx, call{method: http.MethodGet, url: u, head: acceptIndex(), most: min(left, MaxManifest), stay: true})
		})
		if page == 0 && a != nil && noAPI(a, err) {
			l.known.note(ln.host, a, err)
			return found{}
		}
		if err != nil {
			return found{err: ln.failed(err)}
		}
		if err := readReferrers(a.body, c.add); err != nil {
			return found{err: ln.failed(err)}
		}
		l.known.set(ln.host, byAPI)
		left -= int64(len(a.body))
		next, err := ln.next(a)
		switch {
		case err != nil:
			c.cut = err.Error()
		case next == nil:
		case seen[next.String()]:
			c.cut = "its pages lead back to an earlier one"
		case page+1 == maxPages:
			c.cut = "it has more pages than are read"
		case left <= 0:
			c.cut = "it has more bytes than are read"
		}
		if next == nil || c.cut != "" {
			l.told(ln, c.cut)
			return found{list: c.list, there: true}
		}
		u = next
	}
}

// tag reads the index that the fallback tag names. What is no index is none
// (distribution-spec, "Listing Referrers").
func (l *lister) tag(ctx context.Context, ln *line) found {
	a, err := ln.again(ctx, func() (*reply, error) {
		return ln.once(ctx, call{method: http.MethodGet, url: ln.at("manifests/" + fallbackTag(l.subject)), head: acceptIndex(), most: MaxManifest})
	})
	if a != nil && a.code == http.StatusNotFound {
		return found{}
	}
	if err != nil {
		return found{err: ln.failed(err)}
	}
	// GitLab takes the tag for the digest and answers with the subject, whose
	// own manifests are no referrers.
	if digest.FromBytes(a.body) == l.subject {
		return found{}
	}
	c := collector{types: l.types}
	if err := readReferrers(a.body, c.add); err != nil {
		l.told(ln, err.Error())
		return found{}
	}
	l.told(ln, c.cut)
	return found{list: c.list, there: true}
}

func (l *lister) told(ln *line, cut string) {
	if cut != "" {
		l.log.Warn("list of referrers is not whole", "ref", l.name.Familiar(), "host", ln.host.addr, "digest", l.subject, "err", cut)
	}
}

func acceptIndex() http.Header { return http.Header{"Accept": {ocispec.MediaTypeImageIndex}} }

// noAPI reports whether an answer is that of a registry without the API. Those
// that do not know the path say 404, 405, 400 or 501; GHCR sends to a page of
// its web interface, others give one.
func noAPI(a *reply, err error) bool {
	switch a.code {
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusBadRequest, http.StatusNotImplemented:
		return true
	case http.StatusOK:
		return err == nil && !isReferrers(a)
	}
	return a.code >= 300 && a.code < 400
}

// way is what a host is asked by.
type way int

const (
	byBoth way = iota // not known yet
	byAPI
	byTag
)

const (
	maxListings = 256       // hosts that are remembered
	listingTime = time.Hour // after which a registry may have learnt the API
)

// listings is the memory of which hosts have the referrers API, and of which
// fallback tags are just being written. The zero value is empty.
type listings struct {
	mu    sync.Mutex // guards what follows
	hosts map[string]listing
	held  map[string]chan struct{}
}

type listing struct {
	way   way
	until time.Time
}

func listingKey(h host) string { return h.addr + h.prefix }

func (k *listings) of(h host) way {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e := k.hosts[listingKey(h)]; time.Now().Before(e.until) {
		return e.way
	}
	return byBoth
}

func (k *listings) set(h host, w way) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key := listingKey(h)
	if w == byBoth {
		delete(k.hosts, key)
		return
	}
	if k.hosts == nil {
		k.hosts = map[string]listing{}
	}
	if _, ok := k.hosts[key]; !ok && len(k.hosts) >= maxListings {
		for old := range k.hosts {
			delete(k.hosts, old) // any: a wrong choice costs one request
			break
		}
	}
	k.hosts[key] = listing{way: w, until: time.Now().Add(listingTime)}
}

// note remembers that a host has no API, if its answer is about the path. A
// repository that is not there, or a request that it did not like, says nothing
// about others.
func (k *listings) note(h host, a *reply, err error) {
	if a.code == http.StatusBadRequest || slices.ContainsFunc(codesOf(err), func(c string) bool {
		return c == "NAME_UNKNOWN" || c == "NAME_INVALID" || c == "MANIFEST_UNKNOWN" || c == "DIGEST_INVALID"
	}) {
		k.set(h, byBoth)
		return
	}
	k.set(h, byTag)
}

// hold waits until nobody else of this process writes the list called key.
func (k *listings) hold(ctx context.Context, key string) (release func(), err error) {
	for {
		k.mu.Lock()
		other := k.held[key]
		if other == nil {
			mine := make(chan struct{})
			if k.held == nil {
				k.held = map[string]chan struct{}{}
			}
			k.held[key] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				defer k.mu.Unlock()
				delete(k.held, key)
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
