package test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/varvefs/varve/bench/forms"
	"github.com/varvefs/varve/bench/link"
	"github.com/varvefs/varve/daemon"
	"github.com/varvefs/varve/fetch/profile"
)

func TestProfilePush(t *testing.T) {
	needRoot(t)
	for name, fault := range map[string]func(*http.Request) *link.Fault{"api": nil, "tag": withoutReferrers} {
		t.Run(name, func(t *testing.T) { profilePush(t, fault) })
	}
}

func profilePush(t *testing.T, fault func(*http.Request) *link.Fault) {
	p := newProfiled(t, forms.EStargz)
	p.rec.SetFault(fault)
	h := p.recorded()
	if line := h.fails(3, "profile", "pull", p.ref); !strings.Contains(line, `no start-up profile "default" in its registry`) {
		t.Errorf("profile pull: %s", line)
	}
	out := h.ok("profile", "push", p.ref)
	if again := h.ok("profile", "push", p.ref); again != out {
		t.Errorf("pushed once more: %s\nwas: %s", again, out)
	}
	id := strings.Fields(out)[3]
	if ls := h.ok("profile", "ls", "--remote", p.ref); !strings.Contains(ls, id) || strings.Count(ls, "\n") != 1 {
		t.Errorf("profile ls --remote: %s", ls)
	}

	// The list of referrers brings it: nothing is asked for one after another.
	asked, ranges := p.ready(newHost(t), "referrer")
	want := map[string]int{"manifest": 1, "referrer": 1}
	if fault != nil {
		want["manifest"] = 2 // the fallback tag
	} else {
		delete(asked, "manifest") // that of the tag, which was given up
		delete(want, "manifest")
	}
	delete(asked, "ping")
	delete(asked, "blob")
	delete(asked, "config")
	if fmt.Sprint(asked) != fmt.Sprint(want) {
		t.Errorf("a first mount with a pushed profile asked for %v, want %v", asked, want)
	}
	if _, whole := blobBytes(ranges); whole != 0 {
		t.Errorf("%d bytes of other blobs", whole)
	}

	// One that is too large for a list is read from its blob.
	m := p.manifest(profiledRepo, id)
	delete(m.Annotations, "dev.varve.profile")
	p.replace(p.ref, id, m)
	if _, ranges = p.ready(newHost(t), "referrer"); !slices.ContainsFunc(ranges, func(q link.Request) bool { return strings.HasSuffix(q.Path, m.Layers[0].Digest.String()) }) {
		t.Errorf("its blob was not asked for: %v", ranges)
	}
	puller := newHost(t)
	puller.ok("profile", "pull", p.ref)
	p.ready(puller, "local")

	// What was recorded by the mounts since does not touch what is pushed.
	h.ok("profile", "rm", "--remote", p.ref)
	if ls := h.ok("profile", "ls", "--remote", p.ref); strings.Contains(ls, "sha256") {
		t.Errorf("profile ls --remote after rm: %s", ls)
	}
	h.ok("profile", "rm", p.ref)
	h.fails(3, "profile", "show", p.ref)
	h.fails(3, "profile", "rm", "--name", "default", p.ref)
	h.fails(3, "profile", "push", p.ref)
}

// replace has another manifest in the place of a pushed profile.
func (p *profiled) replace(ref, id string, m ocispec.Manifest) {
	p.t.Helper()
	newHost(p.t).ok("profile", "rm", "--remote", ref)
	raw, err := json.Marshal(m)
	must(p.t, err)
	other := digest.FromBytes(raw)
	p.send(http.MethodPut, profiledRepo+"/manifests/"+other.String(), ocispec.MediaTypeImageManifest, raw)
	list, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{{
		MediaType: ocispec.MediaTypeImageManifest, Digest: other, Size: int64(len(raw)), ArtifactType: m.ArtifactType, Annotations: m.Annotations,
	}}})
	must(p.t, err)
	list = []byte(strings.Replace(string(list), `"schemaVersion":0`, `"schemaVersion":2`, 1))
	p.send(http.MethodPut, profiledRepo+"/manifests/"+strings.Replace(m.Subject.Digest.String(), ":", "-", 1), ocispec.MediaTypeImageIndex, list)
}

// TestProfileOfOthers has the registry list profiles that are not to be used, and
// one that is, among a thousand.
func TestProfileOfOthers(t *testing.T) {
	needRoot(t)
	p := newProfiled(t, forms.EStargz)
	h := p.recorded()
	id := strings.Fields(h.ok("profile", "push", p.ref))[3]
	good := p.manifest(profiledRepo, id)
	raw, err := base64.StdEncoding.DecodeString(good.Annotations["dev.varve.profile"])
	must(t, err)
	entry := func(year int, name string, b []byte) ocispec.Descriptor {
		return ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, ArtifactType: good.ArtifactType, Digest: digest.FromString(fmt.Sprint(year, name)), Size: 1000,
			Annotations: map[string]string{
				"dev.varve.profile.name": name, "dev.varve.profile": base64.StdEncoding.EncodeToString(b),
				ocispec.AnnotationCreated: time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC).Format(time.RFC3339),
			},
		}
	}
	foreign := mustGet[*profile.Profile](t)(profile.Decode(raw))
	foreign.Manifest = digest.FromString("another").String()
	list := []ocispec.Descriptor{
		entry(2001, "default", mustGet[[]byte](t)(foreign.Encode())), entry(2002, "web", raw), entry(2003, "default", []byte("junk")), entry(2000, "default", raw),
	}
	for i := range 1000 {
		list = append(list, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: good.ArtifactType, Digest: digest.FromString(fmt.Sprint("old", i)), Size: 500})
	}
	page, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageIndex, "manifests": list})
	must(t, err)
	answer := func(f *link.Fault) {
		p.rec.SetFault(func(q *http.Request) *link.Fault {
			if link.ClassOf(q) == link.Referrer || strings.Contains(q.URL.Path, "/manifests/sha256-") {
				return f
			}
			return nil
		})
	}
	answer(&link.Fault{Status: http.StatusOK, Body: page, Header: http.Header{"Content-Type": {ocispec.MediaTypeImageIndex}}})
	other := newHost(t)
	p.ready(other, "referrer")
	if log := other.logText(); strings.Count(log, "profile of another image") != 1 || !strings.Contains(log, "start-up profile in a list of referrers not used") {
		t.Errorf("log: %s", log)
	}

	// Where the list is not to be had, a mount goes on as ever.
	for _, f := range []*link.Fault{
		{Status: http.StatusForbidden}, {Status: http.StatusOK, Header: http.Header{"Content-Type": {ocispec.MediaTypeImageIndex}}, Body: []byte("{")},
	} {
		answer(f)
		h := newHost(t)
		p.requests(p.img)
		dir := h.ok("mount", p.ref)
		if m := h.until(dir, func(m daemon.Mount) bool { return m.Profile.State == "failed" }); m.Profile.Source != "none" || !strings.Contains(m.Profile.Error, "list") {
			t.Errorf("inspect: %+v", m.Profile)
		}
		p.start(dir)
		h.ok("umount", dir)
	}
}
