"""A statement proves who made it, and nothing else does."""

import base64
from dataclasses import replace
from datetime import timedelta

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from certs.authority import Authority
from certs.statement import TYPE, BadStatement, sign, verify
from certs.svid import Svid
from tests.certs.pki import API, B_TEST, LIFETIME, NOW, a_leaf, an_authority, bundles_of

CLAIMS = {"seq": 7, "prev": "ab"}


def an_svid(authority: Authority) -> Svid:
    """Return an SVID with a key of its own; nothing in it is checked."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = a_leaf(authority, key=key)
    return Svid(
        spiffe_id=API,
        chain_der=(leaf,),
        key_der=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        serial=0,
        not_before=NOW,
        not_after=NOW + LIFETIME,
    )


def test_a_statement_names_its_signer_and_its_time() -> None:
    """Later, too: it is judged at the time that it names."""
    authority = an_authority()
    at = NOW + LIFETIME / 2

    signer, claims = verify(sign(CLAIMS, an_svid(authority), now=at), bundles_of(a=authority))

    assert signer == API
    assert claims == {**CLAIMS, "iat": int(at.timestamp())}


def test_a_statement_from_outside_the_life_of_the_svid_is_refused() -> None:
    """Its key may have been anybody's then."""
    authority = an_authority()
    statement = sign(CLAIMS, an_svid(authority), now=NOW + LIFETIME + timedelta(seconds=1))

    with pytest.raises(BadStatement, match=r"expired|valid"):
        verify(statement, bundles_of(a=authority))


def test_another_domain_s_authority_proves_nothing() -> None:
    """Not even when it is trusted for its own domain."""
    ours, theirs = an_authority(), an_authority(B_TEST)
    statement = sign(CLAIMS, an_svid(theirs), now=NOW)

    with pytest.raises(BadStatement, match="does not chain"):
        verify(statement, bundles_of(a=ours, b=theirs))


def test_another_s_chain_does_not_lend_its_name() -> None:
    """The signature is checked by the key of the chain that is shown."""
    authority = an_authority()
    mine, yours = an_svid(authority), an_svid(authority)
    forged = sign(CLAIMS, replace(mine, chain_der=yours.chain_der), now=NOW)

    with pytest.raises(BadStatement, match="Signature"):
        verify(forged, bundles_of(a=authority))


def test_the_key_decides_the_algorithm() -> None:
    """A header that names a symmetric one or none is not followed."""
    authority = an_authority()
    x5c = [base64.b64encode(an_svid(authority).chain_der[0]).decode()]
    for algorithm, key in (("HS256", "k" * 32), ("none", "")):
        statement = jwt.encode({**CLAIMS, "iat": 1}, key, algorithm=algorithm, headers={"typ": TYPE, "x5c": x5c})
        with pytest.raises(BadStatement, match=r"alg value is not allowed"):
            verify(statement, bundles_of(a=authority))


def test_a_token_for_another_use_is_no_statement() -> None:
    """What the key signed for somebody else must not count here."""
    authority = an_authority()
    svid = an_svid(authority)
    header = jwt.get_unverified_header(sign(CLAIMS, svid, now=NOW))
    statement = jwt.encode(
        {**CLAIMS, "iat": int(NOW.timestamp())},
        _key(svid),
        algorithm="ES256",
        headers={**header, "typ": "JWT"},
    )

    with pytest.raises(BadStatement, match="type 'JWT'"):
        verify(statement, bundles_of(a=authority))


def test_an_rsa_key_signs_too() -> None:
    """SPIRE can be told to issue those."""
    authority = an_authority()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    leaf = a_leaf(authority, key=key)  # type: ignore[arg-type] # the builder takes any key
    svid = replace(
        an_svid(authority),
        chain_der=(leaf,),
        key_der=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    )

    assert verify(sign(CLAIMS, svid, now=NOW), bundles_of(a=authority))[0] == API


@pytest.mark.parametrize("statement", ["", "x", "a.b.c", "e30.e30.", "eyJhbGciOiJFUzI1NiIsIng1YyI6WyIhIl19.e30.AA"])
def test_nonsense_is_refused(statement: str) -> None:
    """Whatever it is."""
    with pytest.raises(BadStatement):
        verify(statement, bundles_of(a=an_authority()))


def _key(svid: Svid) -> ec.EllipticCurvePrivateKey:
    key = load_der_private_key(svid.key_der, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key
