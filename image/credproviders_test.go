package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
)

// TestMatchesImage has the kubelet's own examples (kubelet-config.v1).
func TestMatchesImage(t *testing.T) {
	for _, tt := range []struct {
		pattern, registry, repo string
		want                    bool
	}{
		{"123456789.dkr.ecr.us-east-1.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com", "a", true},
		{"*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "a/b", true},
		{"*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu.west.amazonaws.com", "a", false},
		{"*.azurecr.io", "my.azurecr.io", "a", true},
		{"*.azurecr.io", "azurecr.io", "a", false},
		{"gcr.io", "gcr.io", "p/a", true},
		{"gcr.io", "eu.gcr.io", "p/a", false},
		{"*.*.registry.io", "a.b.registry.io", "x", true},
		{"foo.registry.io:8080/path", "foo.registry.io:8080", "path/x", true},
		{"foo.registry.io:8080/path", "foo.registry.io", "path/x", false},
		{"foo.registry.io:8080/path", "foo.registry.io:8080", "other/path", false},
		{"registry.io:8080", "registry.io", "x", false},
		{"app*.k8s.io", "apple.k8s.io", "x", true},
		{"docker.io", "docker.io", "library/nginx", true},
		{"https://index.docker.io/v1/", "docker.io", "library/nginx", true},
		{"docker.io/me", "docker.io", "you/x", false},
		{"[", "reg.test", "x", false},
		{"", "reg.test", "x", false},
		{"*", "reg.test", "x", false},
	} {
		if got := matchesImage(tt.pattern, tt.registry, tt.repo); got != tt.want {
			t.Errorf("%s for %s/%s: %v", tt.pattern, tt.registry, tt.repo, got)
		}
	}
}

// plugin is a credential provider that notes each of its runs.
type plugin struct {
	t   *testing.T
	dir string
}

// newPlugin makes one that answers with a script's output. version is the
// protocol's, more is added to its configuration.
func newPlugin(t *testing.T, version, more, script string) (*plugin, *Providers) {
	t.Helper()
	p := &plugin{t, t.TempDir()}
	if err := os.WriteFile(filepath.Join(p.dir, "helper"), fmt.Appendf(nil, "#!/bin/sh\ncat >> %s/asked; echo >> %[1]s/asked\n%s", p.dir, script), 0o755); err != nil {
		t.Fatal(err)
	}
	config := putFile(t, filepath.Join(p.dir, "config.yaml"), fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: helper
  matchImages: ["*.test", "docker.io"]
  defaultCacheDuration: 12h
  apiVersion: credentialprovider.kubelet.k8s.io/%s
%s`, version, more))
	return p, NewProviders(config, p.dir, nil)
}

// asked gives the images that it was asked for.
func (p *plugin) asked() (images []string) {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.dir, "asked"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		var r struct{ APIVersion, Kind, Image string }
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.Kind != "CredentialProviderRequest" || !strings.HasPrefix(r.APIVersion, "credentialprovider.kubelet.k8s.io/v1") {
			p.t.Errorf("request %q", line)
		}
		images = append(images, r.Image)
	}
	return images
}

func answer(version, key, more string) string {
	return fmt.Sprintf(`{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/%s","cacheKeyType":%q%s}`, version, key, more)
}

func TestProviderCache(t *testing.T) {
	const auth = `,"auth":{"*.test":{"username":"u","password":"p"}}`
	for _, tt := range []struct {
		name, version, answer string
		want                  []string
	}{
		{"image", "v1", answer("v1", "Image", auth), []string{"a.test/x", "a.test/y", "b.test/x"}},
		{"registry", "v1beta1", answer("v1beta1", "Registry", auth), []string{"a.test/x", "b.test/x"}},
		{"global", "v1", answer("v1", "Global", auth), []string{"a.test/x"}},
		{"not kept", "v1", answer("v1", "Global", `,"cacheDuration":"0s"`+auth), []string{"a.test/x", "a.test/x", "a.test/y", "b.test/x"}},
		{"for a while", "v1", answer("v1", "Global", `,"cacheDuration":"1h0m0s"`+auth), []string{"a.test/x"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, providers := newPlugin(t, tt.version, "", "echo '"+tt.answer+"'")
			for _, image := range []string{"a.test/x", "a.test/x", "a.test/y", "b.test/x"} {
				registry, repo, _ := strings.Cut(image, "/")
				got, err := providers.find(t.Context(), registry, repo, false)
				if d := cmp.Diff([]authn.AuthConfig{{Username: "u", Password: "p"}}, got); d != "" || err != nil {
					t.Errorf("%s: %v %s", image, err, d)
				}
			}
			if got, err := providers.find(t.Context(), "else.where", "x", false); got != nil || err != nil {
				t.Errorf("an image that it is not for: %v", err)
			}
			if d := cmp.Diff(tt.want, p.asked()); d != "" {
				t.Error(d)
			}
			before := len(p.asked())
			if _, err := providers.find(t.Context(), "a.test", "x", true); err != nil || len(p.asked()) != before+1 {
				t.Errorf("asked again: %d runs, %v", len(p.asked())-before, err)
			}
		})
	}
}

func TestProviderRun(t *testing.T) {
	t.Setenv("OUTER", "outer")
	_, providers := newPlugin(t, "v1", "  args: [one, \"two words\"]\n  env: [{name: INNER, value: inner}]\n",
		`printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Image","auth":{"a.test/ns":{"username":"%s","password":"ns"},"a.test":{"username":"%s-%s","password":"all"},"b.test":{"username":"b","password":"b"}}}' "$1+$2" "$INNER" "$OUTER"`)
	got, err := providers.find(t.Context(), "a.test", "ns/x", false)
	want := []authn.AuthConfig{{Username: "one+two words", Password: "ns"}, {Username: "inner-outer", Password: "all"}}
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v %s", err, d)
	}
}

func TestProviderFaults(t *testing.T) {
	const secret = "hunter2"
	for _, tt := range []struct{ name, script, want string }{
		{"no JSON", "echo " + secret, "no CredentialProviderResponse"},
		{"another kind", `echo '{"kind":"X","password":"` + secret + `"}'`, "no CredentialProviderResponse"},
		{"another version", "echo '" + answer("v1beta1", "Image", `,"auth":{"a.test":{"password":"`+secret+`"}}`) + "'", "not of credentialprovider.kubelet.k8s.io/v1"},
		{"another key", "echo '" + answer("v1", "Moon", "") + "'", "cacheKeyType"},
		{"a wrong duration", "echo '" + answer("v1", "Image", `,"cacheDuration":"-1h"`) + "'", "no CredentialProviderResponse"},
		{"a wrong password", "echo '" + answer("v1", "Image", `,"auth":{"a.test":{"password":["`+secret+`"]}}`) + "'", "no CredentialProviderResponse"},
		{"it fails", "echo no role for this machine >&2; exit 3", "exit status 3: no role for this machine"},
		{"it fails and tells", "echo the password is " + secret + " >&2; exit 3", "not shown"},
		{"without end", "yes " + secret, "more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, providers := newPlugin(t, "v1", "", tt.script)
			got, err := providers.find(t.Context(), "a.test", "x", false)
			if got != nil || !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), secret) || !strings.Contains(err.Error(), "helper") {
				t.Errorf("%v, %v: want %q", got, err, tt.want)
			}
		})
	}
	p, providers := newPlugin(t, "v1", "", "")
	if err := os.Remove(filepath.Join(p.dir, "helper")); err != nil {
		t.Fatal(err)
	}
	if _, err := providers.find(t.Context(), "a.test", "x", false); !errors.Is(err, ErrUnauthorized) {
		t.Errorf("no such program: %v", err)
	}
	_, providers = newPlugin(t, "v1", "  tokenAttributes: {serviceAccountTokenAudience: x, requireServiceAccount: true}\n", "exit 1")
	if got, err := providers.find(t.Context(), "a.test", "x", false); got != nil || err != nil {
		t.Errorf("one that needs a pod: %v %v", got, err)
	}
}

func TestProviderConfig(t *testing.T) {
	const entry = `{"name":"%s","matchImages":["a"],"defaultCacheDuration":"1h","apiVersion":"credentialprovider.kubelet.k8s.io/v1"}`
	config := func(kind, entries string) string {
		return `{"apiVersion":"kubelet.config.k8s.io/v1beta1","kind":"` + kind + `","providers":[` + entries + `]}`
	}
	for _, tt := range []struct{ name, text, want string }{
		{"one", config("CredentialProviderConfig", fmt.Sprintf(entry, "a")), ""},
		{"none", config("CredentialProviderConfig", ""), ""},
		{"another kind", config("Pod", ""), `"Pod"`},
		{"a path", config("CredentialProviderConfig", fmt.Sprintf(entry, "../../bin/sh")), "not the name of a file"},
		{"up", config("CredentialProviderConfig", fmt.Sprintf(entry, "..")), "not the name of a file"},
		{"twice", config("CredentialProviderConfig", fmt.Sprintf(entry, "a")+","+fmt.Sprintf(entry, "a")), "twice"},
		{"version", config("CredentialProviderConfig", `{"name":"a","apiVersion":"v9"}`), "v9"},
		{"not YAML", "args: [hunter2", "not YAML"},
	} {
		_, err := parseProviders([]byte(tt.text))
		if tt.want == "" != (err == nil) || err != nil && (!strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	// A directory of them.
	dir := t.TempDir()
	putFile(t, filepath.Join(dir, "1.json"), config("CredentialProviderConfig", fmt.Sprintf(entry, "a")))
	putFile(t, filepath.Join(dir, "2.yaml"), config("CredentialProviderConfig", fmt.Sprintf(entry, "b")))
	putFile(t, filepath.Join(dir, "README"), "not one")
	all, err := NewProviders(dir, dir, nil).providers()
	if err != nil || len(all) != 2 || all[1].Name != "b" {
		t.Errorf("a directory: %v %v", all, err)
	}
	if err := NewProviders(filepath.Join(dir, "3"), dir, nil).Check(); err == nil {
		t.Error("a file that is not there is right")
	}
}

func FuzzProviderAnswer(f *testing.F) {
	f.Add([]byte(answer("v1", "Image", `,"cacheDuration":"5m","auth":{"*.test":{"username":"u","password":"p"}}`)))
	f.Add([]byte(`{"auth":{"":{}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAnswer(b, providerVersions[0])
		if err != nil {
			return
		}
		if a.CacheDuration != nil && *a.CacheDuration < 0 || len(a.Auth) > maxAnswerAuth || a.APIVersion != providerVersions[0] {
			t.Errorf("%+v", a)
		}
		for pattern := range a.credentials() {
			matchesImage(pattern, "reg.test", "ns/app")
		}
	})
}

func FuzzProviderConfig(f *testing.F) {
	f.Add([]byte("apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- {name: a, matchImages: [a], defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}\n"))
	f.Add([]byte("a: &a [*a, *a]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseProviders(b)
		if err != nil {
			return
		}
		for _, p := range all {
			if filepath.Base(p.Name) != p.Name || len(p.MatchImages) == 0 || *p.DefaultCacheDuration < 0 {
				t.Errorf("%+v", p)
			}
			p.forImage("reg.test", "ns/app")
		}
	})
}
