package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

// putHelper puts a docker-credential-NAME on PATH that runs a shell script.
func putHelper(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-"+name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func putFile(t *testing.T, file, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// best gives the first credential that a lookup finds, or what fails before it.
func best(l lookup) (authn.AuthConfig, error) {
	for _, s := range l.sources() {
		creds, err := s.find(context.Background())
		if err != nil {
			return authn.AuthConfig{}, err
		}
		if len(creds) > 0 {
			return creds[0], nil
		}
	}
	return authn.AuthConfig{}, nil
}

func TestCredentials(t *testing.T) {
	// The script answers with the server it was asked for as user.
	putHelper(t, "good", `read s; [ "$s" = none.test ] && { echo "credentials not found in native keychain"; exit 1; }; echo "{\"Username\":\"$s\",\"Secret\":\"p\"}"`)
	putHelper(t, "token", `echo '{"Username":"<token>","Secret":"ident"}'`)
	putHelper(t, "bad", `echo '{"Username":"u","Secret":"hunter2"}'; exit 3`)
	const up = `{"auth":"dTpw"}` // u:p
	dir := t.TempDir()
	a := Auth{
		DockerConfig: filepath.Join(dir, "docker"), AuthFile: filepath.Join(dir, "explicit.json"),
		RuntimeDir: filepath.Join(dir, "run"), ConfigHome: filepath.Join(dir, "config"),
	}
	putFile(t, a.AuthFile, `{"auths":{"first.test":{"auth":"ZmlsZTpw"}}}`)
	putFile(t, filepath.Join(a.RuntimeDir, "containers/auth.json"), `{"auths":{
		"reg.test":{"auth":"aG9zdDpw"},"reg.test/ns":{"auth":"bnM6cA=="},"reg.test/ns/repo":{"auth":"cmVwbzpw"},"first.test":`+up+`}}`)
	putFile(t, filepath.Join(a.DockerConfig, "config.json"), `{"auths":{"https://index.docker.io/v1/":`+up+`,"plain.test":{}},
		"credHelpers":{"help.test":"good","ident.test":"token","bad.test":"bad","gone.test":"missing","none.test":"good"}}`)
	putFile(t, filepath.Join(a.ConfigHome, "containers/auth.json"), `{"auths":{"last.test":`+up+`,"none.test":`+up+`}}`)

	for _, tt := range []struct{ registry, repo, user, err string }{
		{"first.test", "a", "file", ""},
		{"reg.test", "other/x", "host", ""},
		{"reg.test", "ns/x", "ns", ""},
		{"reg.test", "ns/repo", "repo", ""},
		{"reg.test", "nsx/repo", "host", ""},
		{"docker.io", "library/nginx", "u", ""},
		{"help.test", "a", "help.test", ""},
		{"none.test", "a", "u", ""},
		{"last.test", "a", "u", ""},
		{"plain.test", "a", "", ""},
		{"bad.test", "a", "", "docker-credential-bad"},
		{"gone.test", "a", "", "docker-credential-missing"},
	} {
		ac, err := best(lookup{auth: a, registry: tt.registry, repository: tt.repo})
		switch {
		case tt.err != "":
			if !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s: %v", tt.registry, err)
			}
		case err != nil || ac.Username != tt.user:
			t.Errorf("%s/%s: %q, %v; want %q", tt.registry, tt.repo, ac.Username, err, tt.user)
		}
	}
	ac, err := best(lookup{auth: a, registry: "ident.test", repository: "x"})
	if err != nil || ac != (authn.AuthConfig{IdentityToken: "ident"}) {
		t.Errorf("identity token: %v", err)
	}
	putFile(t, a.AuthFile, `{"auths":{"x":{"auth":"hunter2"}}}`)
	if _, err := best(lookup{auth: a, registry: "first.test", repository: "x"}); err == nil || !strings.Contains(err.Error(), a.AuthFile) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("bad file: %v", err)
	}
}

func FuzzDockerConfig(f *testing.F) {
	f.Add("config.json", []byte(`{"auths":{"reg.test/ns":{"auth":"dTpw"},"*.test":{"username":"u","password":"p"}},"credsStore":"a/b"}`))
	f.Add(oldConfig, []byte(`{"https://reg.test/v1/":{"auth":"dTpw"}}`))
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		cf, err := parseConfig(name, bytes.NewReader(b))
		if err != nil {
			return
		}
		cf.CredentialHelpers, cf.CredentialsStore = nil, "" // programs are not run here
		ac, found, err := lookup{registry: "reg.test", repository: "ns/app"}.ask(t.Context(), cf, "")
		if err != nil || found != (ac != authn.AuthConfig{}) {
			t.Errorf("%v, found %v", err, found)
		}
	})
}
